// The product on AMX's tiles: 32 rows of x by 32 columns of W in four tiles of sums, or 16 rows by up to 64 columns where
// there are no more; then the low-rank part, in float32 on sums of its own.

constexpr int kTileSide = 16;  // rows of x in one tile, columns of W
constexpr int64_t kTileBytes = 1024;
// Of float32 the sums of so many tiles along k are formed in the tiles and then added to the others'.
constexpr int64_t kBlockTiles = 16;
// Tile products use up weights faster than a core gets them from beyond its second-level cache, half of which so many rows
// may fill that share one reading of the weights.
constexpr int64_t kBlockTilesOfRows = 16, kBlockBytes = 1 << 20;

FS_INLINE int64_t tiles_along(int64_t k) { return (k + kTileDepth - 1) / kTileDepth; }

// Tile registers are in nobody's calling convention, and torch uses them in the same threads: they are set up for one piece
// of work and released behind it.
struct TileRegisters {
    struct Configuration {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };

    TileRegisters() {
        alignas(64) Configuration all = {};
        all.palette = 1;
        for (int i = 0; i < 8; ++i) {
            all.row_bytes[i] = 64;
            all.rows[i] = kTileSide;
        }
        asm volatile("" : : "m"(all) : "memory");  // GCC's own says that 8 of its 64 bytes are read
        _tile_loadconfig(&all);
    }
    ~TileRegisters() { _tile_release(); }
};

// How a layout's result is rounded, and what multiplies in float what tiles cannot.
template <int Parts>
struct Arithmetic : PartWords<Parts> {};
#ifdef FASTSAMPLE_BF16
template <>
struct Arithmetic<1> : BfloatPairs {};
#else
template <>
struct Arithmetic<1> : BfloatAsFloat {};
#endif

// What is rounded away, where the part is left.
FS_INLINE Lanes leave_part(uint16_t* to, Lanes v) {
    Arithmetic<1>::store(to, 0, v);
    return v - load_bits16(to);
}

// A prepared tile of parts begins with this.
struct Head {
    int32_t floats;   // how many rows need float arithmetic: the first of `order`
    int32_t packed;   // how many rows of `order` are there as floats: all, where a panel may need them
    uint32_t needed;  // the same rows, a bit each
    uint8_t order[kMostRows];
};
constexpr int64_t kHeadWords = 16;
static_assert(sizeof(Head) <= kHeadWords * 4, "the head has its place");

// Where things lie in rows of k values that have been packed: tiles of each part, the lower rows' behind the upper ones';
// of parts a head before them, and behind them the rows that need it as floats.
template <int Parts>
struct Packed {
    char* tiles;
    uint32_t* floats;
    int64_t part, below;  // bytes from one part to the next, and to the lower rows
    Words words;

    FS_ALWAYS Packed(const uint32_t* at, int64_t k)
        : part(tiles_along(k) * kTileBytes), below(part * Parts), words(k + (k & 1)) {
        uint32_t* first = const_cast<uint32_t*>(at) + (Parts > 1 ? kHeadWords : 0);
        tiles = (char*)first;
        floats = first + below / 2;
    }
    static int64_t size(int64_t k) {
        const int64_t all = tiles_along(k) * (2 * Parts * kTileBytes / 4);
        constexpr int64_t blocks = (kMostRows + kTileRows - 1) / kTileRows;
        return Parts == 1 ? all : kHeadWords + all + blocks * Words(k + (k & 1)).size();
    }
    FS_ALWAYS char* row(int r) const { return tiles + r / kTileSide * below + r % kTileSide * 64; }
};

template <int Parts>
static int64_t tile_block(int64_t k) {
    return tiles_in_block(kBlockBytes / (tiles_along(k) * 2 * Parts * kTileBytes), kBlockTilesOfRows);
}

// Fewer than 128 bytes, zeros behind them. In whole vectors: what is stored in pieces is slow to be loaded as one.
FS_INLINE const char* take_padded(char (&padded)[kTileDepth * 4], const char* from, int64_t bytes) {
#if FASTSAMPLE_LANES == 16
    for (int64_t at = 0; at < (int64_t)sizeof padded; at += 64) {
        const int64_t left = bytes - at;
        const __mmask64 mask = left >= 64 ? ~(__mmask64)0 : left > 0 ? ((__mmask64)1 << left) - 1 : 0;
        _mm512_store_si512(padded + at, _mm512_maskz_loadu_epi8(mask, from + at));
    }
    return padded;
#else
    memset(padded, 0, sizeof padded);
    return (const char*)memcpy(padded, from, (size_t)bytes);
#endif
}

// One row into tiles; whether it needs float arithmetic.
template <int Parts, int Used>
FS_INLINE bool pack_tile_row(char* to, int64_t part_bytes, const char* row, int64_t k) {
    LaneBits largest = {};
    for (int64_t first = 0; first < k; first += kTileDepth, to += kTileBytes) {
        alignas(64) char padded[kTileDepth * 4];
        const int64_t bytes = Parts == 3 ? 4 : 2, left = k - first;
        const char* from = row + first * bytes;
        if (left < kTileDepth) from = take_padded(padded, from, left * bytes);
        if (Parts == 1) {
            memcpy(to, from, kTileDepth * 2);
            continue;
        }
        for (int i = 0; i < kTileDepth; i += kLanes) {
            Lanes v = Parts == 3 ? take<Lanes>(from + i * 4) : halves((const uint16_t*)from + i);
            const LaneBits magnitude = (LaneBits)v & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
            for (int p = 0; p < Used; ++p) v = leave_part((uint16_t*)(to + p * part_bytes) + i, v);
        }
    }
    uint32_t most = 0;
    for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
    return Parts > 1 && needs_floats<Parts>(most);
}

// The rows into tiles; which of them need float arithmetic.
template <int Parts, int Used>
static uint32_t pack_tiles(const Packed<Parts>& packed, const char* const* rows, int count, int64_t k) {
    uint32_t needed = 0;
    for (int r = 0; r < count; ++r)
        needed |= (uint32_t)pack_tile_row<Parts, Used>(packed.row(r), packed.part, rows[r], k) << r;
    return needed;
}

template <int Parts>
static void pack_floats(const Packed<Parts>& packed, const Head& head, const char* const* rows, int64_t k) {
    for (int i = 0; i < head.packed; ++i)
        pack_row<Arithmetic<Parts>>(packed.floats + i / kTileRows * packed.words.size() + i % kTileRows * kPitch,
                                    rows[head.order[i]], k);
}

// `all`: whether a panel may need every row as floats.
static Head head_of(uint32_t needed, int rows, bool all) {
    Head head = {0, 0, needed, {0}};
    for (int r = 0; r < rows; ++r)
        if (needed >> r & 1) head.order[head.floats++] = (uint8_t)r;
    head.packed = head.floats;
    for (int r = 0; all && r < rows; ++r)
        if (!(needed >> r & 1)) head.order[head.packed++] = (uint8_t)r;
    return head;
}

// One tile product's operands along k: x's tiles, and a panel's or two neighbouring panels'.
struct TilePart {
    const char* x;
    int64_t part, below;
    const char* w[2];
    int64_t tiles;
};

// The sum in tile C gains what tile X of x makes with tile 7 of W.
template <int C, int X>
FS_INLINE void add_column() {
    if constexpr (C == 0 && X == 4) _tile_dpbf16ps(0, 4, 7);
    if constexpr (C == 0 && X == 5) _tile_dpbf16ps(0, 5, 7);
    if constexpr (C == 0 && X == 6) _tile_dpbf16ps(0, 6, 7);
    if constexpr (C == 1 && X == 4) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C == 1 && X == 5) _tile_dpbf16ps(1, 5, 7);
    if constexpr (C == 1 && X == 6) _tile_dpbf16ps(1, 6, 7);
    if constexpr (C == 2 && X == 4) _tile_dpbf16ps(2, 4, 7);
    if constexpr (C == 2 && X == 5) _tile_dpbf16ps(2, 5, 7);
    if constexpr (C == 2 && X == 6) _tile_dpbf16ps(2, 6, 7);
    if constexpr (C == 3 && X == 4) _tile_dpbf16ps(3, 4, 7);
    if constexpr (C == 3 && X == 5) _tile_dpbf16ps(3, 5, 7);
    if constexpr (C == 3 && X == 6) _tile_dpbf16ps(3, 6, 7);
}

// Bytes from one pair of k to the next in a panel.
template <int Parts, int C>
constexpr int64_t kPairBytes = (C == 1 ? kHalfPanel : kColumns) * 4 * Parts;

// Which parts are multiplied, in one order for every shape of tile, so that a row's bits do not depend on its neighbours:
// of x and w, 0 the largest: 1: 00. 3: 01 00 10. 4: 11 01 00 10. 6: 02 01 11 10 20 00.

// 32 rows: x in tiles 4 and 5, W in 6 and 7, so that six products a sum need 14 loads for 24.
template <int Parts, int Products, int C>
FS_INLINE void add_32(const TilePart& part, const char* x, const char* w) {
    const auto rows = [&](int p) FS_ALWAYS {
        _tile_loadd(4, x + p * part.part, 64);
        _tile_loadd(5, x + p * part.part + part.below, 64);
    };
    const auto columns = [&](int p) FS_ALWAYS {
        _tile_loadd(6, w + p * 64, (kPairBytes<Parts, C>));
        if constexpr (C == 2) _tile_loadd(7, w + 64 * Parts + p * 64, (kPairBytes<Parts, C>));
    };
    const auto add = []() FS_ALWAYS {
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (C == 2) _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (C == 2) _tile_dpbf16ps(3, 5, 7);
    };
    if constexpr (Products == 1) rows(0), columns(0), add();
    if constexpr (Products == 3) rows(0), columns(1), add(), columns(0), add(), rows(1), add();
    if constexpr (Products == 4) rows(1), columns(1), add(), rows(0), add(), columns(0), add(), rows(1), add();
    if constexpr (Products == 6)
        rows(0), columns(2), add(), columns(1), add(), rows(1), add(), columns(0), add(), rows(2), add(), rows(0), add();
}

// Column C of part P of W by these tiles of x.
template <int Parts, int Columns, int C, int P, int... X>
FS_INLINE void add_part_of_column(const char* const (&w)[2]) {
    if constexpr (C < Columns) {
        _tile_loadd(7, w[C / 2] + C % 2 * 64 * Parts + P * 64, (kPairBytes<Parts, Columns>));
        (add_column<C, X>(), ...);
    }
}
template <int Parts, int Columns, int P, int... X>
FS_INLINE void add_part(const char* const (&w)[2]) {
    add_part_of_column<Parts, Columns, 0, P, X...>(w);
    add_part_of_column<Parts, Columns, 1, P, X...>(w);
    add_part_of_column<Parts, Columns, 2, P, X...>(w);
    add_part_of_column<Parts, Columns, 3, P, X...>(w);
}

// 16 rows: x's parts stay in tiles 4 to 6 while W's pass through tile 7, once each.
template <int Parts, int Products, int C>
FS_INLINE void add_16(const TilePart& part, const char* x, const char* const (&w)[2]) {
    _tile_loadd(4, x, 64);
    if constexpr (Products > 1) _tile_loadd(5, x + part.part, 64);
    if constexpr (Products == 6) _tile_loadd(6, x + 2 * part.part, 64);
    if constexpr (Products == 1) add_part<Parts, C, 0, 4>(w);
    if constexpr (Products == 3) add_part<Parts, C, 1, 4>(w), add_part<Parts, C, 0, 4, 5>(w);
    if constexpr (Products == 4) add_part<Parts, C, 1, 5, 4>(w), add_part<Parts, C, 0, 4, 5>(w);
    if constexpr (Products == 6)
        add_part<Parts, C, 2, 4>(w), add_part<Parts, C, 1, 4, 5>(w), add_part<Parts, C, 0, 5, 6, 4>(w);
}

FS_INLINE void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

template <int R, int C>
FS_INLINE void store_tiles(float* to) {
    constexpr int64_t row = C * kTileSide * 4;
    _tile_stored(0, to, row);
    if constexpr (C > 1) _tile_stored(1, to + 16, row);
    if constexpr (R == 2) {
        _tile_stored(2, to + 16 * C * kTileSide, row);
        if constexpr (C > 1) _tile_stored(3, to + 16 * C * kTileSide + 16, row);
    } else if constexpr (C > 2) {
        _tile_stored(2, to + 32, row);
        _tile_stored(3, to + 48, row);
    }
}

// Base and low rank of R x C tiles, 16 R rows of 16 C floats.
template <int Parts, int Products, int R, int C>
static void tile_sums(const TilePart (&parts)[2], float* sums) {
    constexpr bool blocked = Parts == 3;
    constexpr int64_t count = R * C * 256;
    alignas(64) float block[blocked ? count : 1];
    bool begun = false;
    const auto add_sums = [&]() FS_ALWAYS {
        store_tiles<R, C>(begun ? block : sums);
        if constexpr (blocked)
            for (int64_t at = 0; at < (begun ? count : 0); ++at) sums[at] += block[at];
        begun = true;
    };
    asm volatile("" : : : "memory");  // tile loads do not say that they read memory: all has been packed before
    zero_tiles();
    for (int i = 0; i < 2; ++i) {
        const char *x = parts[i].x, *w[2] = {parts[i].w[0], parts[i].w[1]};
        for (int64_t k = 0; k < parts[i].tiles; ++k) {
            if constexpr (R == 2) add_32<Parts, Products, C>(parts[i], x, w[0]);
            if constexpr (R == 1) add_16<Parts, Products, C>(parts[i], x, w);
            x += kTileBytes;
            for (const char*& one : w) one += kTileDepth / 2 * kPairBytes<Parts, C>;
            const bool last = k + 1 == parts[i].tiles;
            if (!blocked || (last ? i == 1 || parts[1].tiles == 0 : (k + 1) % kBlockTiles != 0)) continue;
            add_sums();
            zero_tiles();
        }
    }
    add_sums();
}

// The rows of a panel that tiles give, from sums of `pitch` floats a row.
template <class A, int V>
FS_INLINE void leave_tiles(const Target& target, int rows, uint32_t without, const float* sums, int pitch) {
    for (int r = 0; r < rows; ++r)
        for (int column = 0; column < target.width && !(without >> r & 1); column += V * kLanes) {
            Lanes row[V];
            for (int v = 0; v < V; ++v) row[v] = take<Lanes>(sums + r * pitch + column + v * kLanes);
            leave_sums<A, V>(target, r, column, row);
        }
}

// One prepared tile by one panel, or by two of 32 columns: `without` tells which rows of which panel tiles do not give.
template <int Parts, int Products>
static void run_tiles(int rows, const TilePart (&parts)[2], const Target* targets, int panels, const uint32_t* without) {
    typedef Arithmetic<Parts> A;
    constexpr int one = kLanes == 16 ? 1 : 2;  // vectors of a half panel
    alignas(64) float sums[1024];
    const bool half = targets[0].width == kHalfPanel;
    if (rows > kTileSide) {
        half ? tile_sums<Parts, Products, 2, 1>(parts, sums) : tile_sums<Parts, Products, 2, 2>(parts, sums);
    } else if (panels == 2) {
        tile_sums<Parts, Products, 1, 4>(parts, sums);
    } else {
        half ? tile_sums<Parts, Products, 1, 1>(parts, sums) : tile_sums<Parts, Products, 1, 2>(parts, sums);
    }
    for (int p = 0; p < panels; ++p) {
        const float* own = sums + p * kColumns;
        half ? leave_tiles<A, one>(targets[p], rows, without[p], own, kHalfPanel)
             : leave_tiles<A, 2>(targets[p], rows, without[p], own, panels * kColumns);
    }
}

// The first `count` rows of the order by a panel, in float arithmetic. t and up: null without a low-rank part.
template <int Parts>
static void run_floats(int count, const Head& head, const Packed<Parts>& x, const char* panel, const Packed<Parts>* t,
                       const char* up, const Target& target) {
    for (int first = 0; first < count; first += kTileRows) {
        const int rows = count - first < kTileRows ? count - first : kTileRows, block = first / kTileRows;
        int64_t row[kTileRows];
        for (int r = 0; r < rows; ++r) row[r] = target.row[head.order[first + r]];
        Product product{{{x.floats + block * x.words.size(), panel, x.words}, {}}, target};
        product.target.row = row;
        if (t) product.parts[1] = {t->floats + block * t->words.size(), up, t->words};
        run_tile<Arithmetic<Parts>>(rows, product);
    }
}

#include "lora_amx_linear.inl"
