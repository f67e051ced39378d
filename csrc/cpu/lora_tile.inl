// One tile of the product: up to kTileRows rows by one panel, all of k, the low-rank part last, without leaving the
// registers.

// A prepared tile by a packed panel.
struct Part {
    const uint32_t* x;
    const char* panel;
    Words words;
};

constexpr int kFetchWords = 4;

// Where a panel's sums go.
struct Target {
    const float* scale;  // of the panel's columns,
    const float* bias;   // one of the two is set
    char* out;           // the panel's first column
    int64_t row_bytes;   // from row to row
    const int64_t* row;  // which rows
    int width;           // the panel's columns,
    int valid;           // those of them that exist
};

struct Product {
    Part parts[2];  // base and low rank
    Target target;
};

// A row's sums from this column on: scaled, or with the bias, and rounded once.
template <class A, int V>
FS_INLINE void leave_sums(const Target& target, int r, int column, const Lanes* sums) {
    Lanes row[V];
    for (int v = 0; v < V; ++v)
        row[v] = target.scale ? sums[v] * take<Lanes>(target.scale + column + v * kLanes)
                              : sums[v] + take<Lanes>(target.bias + column + v * kLanes);
    char* out = target.out + target.row[r] * target.row_bytes;
    if (target.valid == target.width) {
        A::store(out, column, row);
    } else {
        char whole[V * kLanes * 4];
        A::store(whole, 0, row);
        const int count = target.valid - column < V * kLanes ? target.valid - column : V * kLanes;
        if (count > 0) memcpy(out + column * A::out_bytes, whole, (size_t)count * A::out_bytes);
    }
}

// The same of all rows. Most go from registers to where they belong: an index that is known only at run time would have
// all sums stored first.
template <class A, int R, int V>
FS_INLINE void leave_rows(const Target& target, int column, const Lanes (&sums)[R][V]) {
    if (!target.scale && target.valid == target.width) {
        Lanes bias[V];
        for (int v = 0; v < V; ++v) bias[v] = take<Lanes>(target.bias + column + v * kLanes);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            Lanes row[V];
            for (int v = 0; v < V; ++v) row[v] = sums[r][v] + bias[v];
            A::store(target.out + target.row[r] * target.row_bytes, column, row);
        }
        return;
    }
    Lanes kept[R][V];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) kept[r][v] = sums[r][v];
    for (int r = 0; r < R; ++r) leave_sums<A, V>(target, r, column, kept[r]);
}

// Words [begin, end) of x by the panel's next rows.
template <class A, int R, int V>
FS_INLINE const char* add_steps(Lanes (&acc)[R][V], const uint32_t* x, const char* w, int64_t step_bytes, int64_t begin,
                                int64_t end) {
    for (int64_t k = begin; k < end; k += A::step_words, w += step_bytes) A::template step<R, V>(acc, x + k, w);
    return w;
}

template <class A, int R, int V>
static void tile_product(const Product& product, int column) {
    const Target& target = product.target;
    Lanes acc[R][V] = {};
    alignas(64) float sums[R][V * kLanes];
    const bool apart = A::separate && product.parts[1].words.blocks > 0;
    const bool summed = apart || product.parts[0].words.blocks > 1 || product.parts[1].words.blocks > 1;
    if (summed) memset(sums, 0, sizeof sums);
    for (int part = 0; part < 2; ++part) {
        const Words words = product.parts[part].words;
        if (words.all == 0) continue;
        const uint32_t* x = product.parts[part].x;
        const char* w = product.parts[part].panel + column * A::column_bytes;
        const int64_t step_bytes = (int64_t)target.width * A::column_bytes;
        for (int64_t first = 0; first < words.all; first += words.each, x += kBlockWords) {
            const int64_t count = words.in(first);
            int64_t k = 0;
            // The result's lines arrive one after the other while the sums are formed: stores that wait for them would
            // hold up the next tile, and so would asking for all at once.
            for (int r = 0; part == 0 && first == 0 && r < R && k + kFetchWords <= count; ++r, k += kFetchWords) {
                const char* line = target.out + target.row[r] * target.row_bytes + column * A::out_bytes;
                for (int i = 0; i < V * kLanes * A::out_bytes; i += 64) __builtin_prefetch(line + i, 1);
                w = add_steps<A, R, V>(acc, x, w, step_bytes, k, k + kFetchWords);
            }
            w = add_steps<A, R, V>(acc, x, w, step_bytes, k, count);
            if (first + words.each >= words.all && !(apart && part == 0)) continue;
#pragma GCC unroll 14
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    float* sum = sums[r] + v * kLanes;
                    leave(sum, take<Lanes>(sum) + acc[r][v]);
                    acc[r][v] = Lanes{};
                }
        }
    }
    if (summed)
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + take<Lanes>(sums[r] + v * kLanes);
    leave_rows<A, R, V>(target, column, acc);
}

typedef void (*TileProduct)(const Product&, int);

// tile_product of kTileRows, ... 2, 1 rows.
template <class A, int V, int... R>
struct EveryHeight : EveryHeight<A, V, sizeof...(R) + 1, R...> {};
template <class A, int V, int... R>
struct EveryHeight<A, V, kTileRows, R...> {
    static constexpr TileProduct of_rows[] = {tile_product<A, kTileRows, V>, tile_product<A, R, V>...};
};

template <class A>
FS_INLINE void run_tile(int rows, const Product& product) {
    if (kLanes == kHalfPanel && product.target.width == kHalfPanel) {
        EveryHeight<A, 1>::of_rows[kTileRows - rows](product, 0);
        return;
    }
    for (int column = 0; column < product.target.width; column += 2 * kLanes)
        EveryHeight<A, 2>::of_rows[kTileRows - rows](product, column);
}
