// Floats as sums of bfloat16, each the rounded rest of those before it: a float32 of three, a float16 of two, exactly. Tile
// products of parts then give sums of floats. What they cannot give (infinities, NaN, magnitudes whose products leave
// float's range) is marked here and goes through float arithmetic on the same memory.

// Exponents, as they are biased, of the float32 values that are stored as sums, of which no part is subnormal. Smaller and
// larger ones are stored as their bits: the upper 16, and two bytes as the sign and fraction of subnormals, which products
// take for 0.
constexpr uint32_t kLeastExponent = 24, kMostExponent = 187;
// Rows of x and columns of W whose largest magnitude lies outside are left to float arithmetic: 2^-50 and 2^60.
constexpr uint32_t kLeastMagnitude = 0x26800000u, kMostMagnitude = 0x5d800000u, kInfinity = 0x7f800000u;

template <int Parts>
FS_INLINE bool needs_floats(uint32_t magnitude) {
    if (Parts == 2) return magnitude >= kInfinity;
    return magnitude > kMostMagnitude || (magnitude != 0 && magnitude < kLeastMagnitude);
}

template <class To, class From>
FS_INLINE To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

FS_INLINE uint32_t exponent_of(uint32_t bits) { return bits >> 23 & 0xffu; }
FS_INLINE uint32_t rounded_part(float v) {
    const uint32_t bits = same_bits<uint32_t>(v);
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
FS_INLINE float part_value(uint32_t part) { return same_bits<float>(part << 16); }
FS_INLINE uint32_t byte_part(uint32_t byte) { return (byte & 0x80u) << 8 | (byte & 0x7fu); }

// What user code may have set for its own arithmetic would lose the bits of small values here.
struct PlainFloats {
    unsigned before = _mm_getcsr();
    PlainFloats() { _mm_setcsr(0x1f80); }
    ~PlainFloats() { _mm_setcsr(before); }
};

// The bits of a weight and its parts.
FS_INLINE uint32_t split(uint32_t bits, uint16_t (&part)[3]) {
    const uint32_t exponent = exponent_of(bits);
    if (exponent < kLeastExponent || exponent > kMostExponent) {
        part[0] = (uint16_t)(bits >> 16);
        part[1] = (uint16_t)byte_part(bits >> 8);
        part[2] = (uint16_t)byte_part(bits);
    } else {
        float rest = same_bits<float>(bits);
        for (int p = 0; p < 3; ++p) {
            uint32_t own = rounded_part(rest);
            if (p == 0 && exponent_of(own << 16) > kMostExponent) own = bits >> 16;
            part[p] = (uint16_t)own;
            rest -= part_value(own);
        }
    }
    return bits & 0x7fffffffu;
}
// A NaN's ten bits go to both parts, so that they can be restored; an infinity is the first alone.
FS_INLINE uint32_t split(uint16_t half, uint16_t (&part)[2]) {
    const uint32_t sign = half & 0x8000u, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) {
        const uint32_t fraction = rest & 0x3ffu;
        part[0] = (uint16_t)(sign | 0x7f80u | (fraction ? 0x40u | fraction >> 4 : 0u));
        part[1] = (uint16_t)(fraction & 0xfu);
        return kInfinity;
    }
    // Exponent and fraction in float's place, times 2^112: subnormals come out exact.
    const float v = same_bits<float>(sign << 16 | same_bits<uint32_t>(same_bits<float>(rest << 13) * 0x1p112f));
    part[0] = (uint16_t)rounded_part(v);
    part[1] = (uint16_t)rounded_part(v - part_value(part[0]));
    return same_bits<uint32_t>(v) & 0x7fffffffu;
}

// A value from its parts, which lie in the upper halves: of vectors or of one.
template <class Values, class Bits>
FS_INLINE Values whole(Bits first, Bits second, Bits third) {
    const Values sum = same_bits<Values>(first) + same_bits<Values>(second) + same_bits<Values>(third);
    const Bits bytes = (((second >> 24) & 0x80u) | ((second >> 16) & 0x7fu)) << 8 | ((third >> 24) & 0x80u) |
                       ((third >> 16) & 0x7fu);
    const auto is_sum = ((first >> 23) & 0xffu) - kLeastExponent <= (Bits{} + (kMostExponent - kLeastExponent));
    return same_bits<Values>(is_sum ? same_bits<Bits>(sum) : first | bytes);
}
template <class Values, class Bits>
FS_INLINE Values whole(Bits first, Bits second) {
    return same_bits<Values>(first) + same_bits<Values>(second);
}

FS_INLINE uint32_t joined(const uint16_t (&part)[3]) {
    return same_bits<uint32_t>(whole<float>((uint32_t)part[0] << 16, (uint32_t)part[1] << 16, (uint32_t)part[2] << 16));
}
FS_INLINE uint16_t joined(const uint16_t (&part)[2]) {
    const uint32_t sign = part[0] & 0x8000u;
    if ((part[0] & 0x7fffu) > 0x7f80u) return (uint16_t)(sign | 0x7c00u | (part[0] & 0x3fu) << 4 | part[1]);
    if ((part[0] & 0x7fffu) == 0x7f80u) return (uint16_t)(sign | 0x7c00u);
    const float v = part_value(part[0]) + part_value(part[1]);
    return (uint16_t)(sign | (same_bits<uint32_t>(v * 0x1p-112f) & 0x7fffffffu) >> 13);
}

// In a panel of parts every two k have, for every 16 columns, 16 pairs of each part.
template <int Parts>
FS_INLINE int64_t part_place(int64_t k, int column, int width) {
    return (k / 2 * width + column / 16 * 16) * 2 * Parts + column % 16 * 2 + k % 2;
}

// Both directions of one panel: visit(value among the rows, first part, whose next ones lie 32 values on, column).
template <int Parts, class Value, class Visit>
FS_INLINE void each_split(Value* rows, int64_t n, int64_t k, uint16_t* panel, int64_t p, Visit visit) {
    const int width = width_of(n, p), valid = valid_of(n, p);
    for (int64_t i = 0; i < k; ++i)
        for (int c = 0; c < valid; ++c)
            visit(rows[(p * kColumns + c) * k + i], panel + part_place<Parts>(i, c, width), c);
}

template <int Parts, class Value>
static void pack_parts(const void* rows, int64_t n, int64_t k, void* packed, int64_t begin, int64_t end) {
    const PlainFloats plain;
    const int layout = Parts == 3 ? kFloatParts : kHalfParts;
    for (int64_t p = begin; p < end; ++p) {
        uint32_t largest[kColumns] = {0};
        uint16_t* panel = (uint16_t*)((char*)packed + panel_offset(n, k, layout, p));
        each_split<Parts>((const Value*)rows, n, k, panel, p, [&](Value value, uint16_t* to, int column) FS_ALWAYS {
            uint16_t part[Parts];
            const uint32_t magnitude = split(value, part);
            largest[column] = magnitude > largest[column] ? magnitude : largest[column];
            for (int i = 0; i < Parts; ++i) to[i * 32] = part[i];
        });
        bool marked = false;
        for (uint32_t one : largest) marked |= needs_floats<Parts>(one);
        ((char*)packed)[kMarks + p] = marked;
    }
}

template <int Parts, class Value>
static void unpack_parts(const void* packed, int64_t n, int64_t k, void* rows, int64_t begin, int64_t end) {
    const PlainFloats plain;
    const int layout = Parts == 3 ? kFloatParts : kHalfParts;
    for (int64_t p = begin; p < end; ++p) {
        uint16_t* panel = (uint16_t*)((char*)packed + panel_offset(n, k, layout, p));
        each_split<Parts>((Value*)rows, n, k, panel, p, [&](Value& value, const uint16_t* from, int) FS_ALWAYS {
            uint16_t part[Parts];
            for (int i = 0; i < Parts; ++i) part[i] = from[i * 32];
            value = joined(part);
        });
    }
}

// Float arithmetic on panels of parts: two words of x a step, the lower and the upper half of a pair.
template <int Parts>
struct PartWords {
    typedef FloatWords<Parts == 2> Values;
    static constexpr int word_values = 1;
    static constexpr bool separate = Values::separate;
    static constexpr int step_words = 2, column_bytes = 4 * Parts, out_bytes = Values::out_bytes;

    static int64_t words(int64_t k) { return k + (k & 1); }

    static void pack(uint32_t* to, const char* row, int64_t first, int64_t count, int64_t depth) {
        const int64_t present = first + count > depth ? depth - first : count;
        Values::pack(to, row, first, present, depth);
        if (present < count) to[present] = 0;
    }
    static inline FS_ALWAYS Lanes multiply_add(Lanes x, Lanes w, Lanes acc) { return add_product(x, w, acc); }
    template <int R, int V>
    static inline FS_ALWAYS void step(Lanes (&acc)[R][V], const uint32_t* x, const char* w) {
        LaneBits part[V][Parts];
        for (int v = 0; v < V; ++v)
            for (int p = 0; p < Parts; ++p)
                part[v][p] = take<LaneBits>(w + v * kLanes / 16 * 64 * Parts + p * 64 + v * kLanes % 16 * 4);
        Lanes columns[V];
        for (int v = 0; v < V; ++v) columns[v] = joined_lanes(part[v], [](LaneBits b) { return b << 16; });
        add_outer<PartWords, R, V>(acc, x, columns);
        for (int v = 0; v < V; ++v) columns[v] = joined_lanes(part[v], [](LaneBits b) { return b & 0xffff0000u; });
        add_outer<PartWords, R, V>(acc, x + 1, columns);
    }
    template <int V>
    static inline FS_ALWAYS void store(void* out, int i, const Lanes (&row)[V]) {
        Values::store(out, i, row);
    }

private:
    template <class Half>
    static inline FS_ALWAYS Lanes joined_lanes(const LaneBits (&part)[3], Half half) {
        return whole<Lanes>(half(part[0]), half(part[1]), half(part[2]));
    }
    template <class Half>
    static inline FS_ALWAYS Lanes joined_lanes(const LaneBits (&part)[2], Half half) {
        return whole<Lanes>(half(part[0]), half(part[1]));
    }
};
