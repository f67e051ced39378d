// prepare and multiply of the table, on tiles.

// Whether any panel that this tile meets is marked.
FS_INLINE bool meets_marks(const LoraArgs* args, const LoraGroup* group) {
    const char* weights = (const char*)args->weights;
    bool found = group && group->total > 0 && has_marks(group->down);
    for (int i = 0; i < args->linears; ++i) {
        const int64_t n = args->columns[i];
        found |= has_marks(weights) || (group && group->linears[i].rank > 0 && has_marks(group->linears[i].up));
        weights += panel_offset(n, args->depth, args->layout, panels_of(n));
    }
    return found;
}

template <int Parts, int Products>
static void prepare_tile(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch) {
    constexpr int used = Products == 1 ? 1 : Products == 6 ? 3 : 2;
    const TileRegisters registers;
    const int64_t bytes = bytes_of(args->layout), depth = args->depth;
    const LoraGroup* group = tile->group < 0 ? nullptr : &args->groups[tile->group];
    const bool all = Parts > 1 && meets_marks(args, group);
    const Packed<Parts> x(scratch, depth);
    const char* rows[kMostRows] = {};
    for (int r = 0; r < tile->rows; ++r) rows[r] = (const char*)args->x + tile->row[r] * args->x_stride * bytes;
    Head head = head_of(pack_tiles<Parts, used>(x, rows, tile->rows, depth), tile->rows, all);
    if (Parts > 1) pack_floats(x, head, rows, depth);
    if (group) {
        char* t = (char*)(scratch + group->rows);
        const int64_t row_bytes = padded_columns(group->total) * bytes;
        int64_t own_rows[kMostRows];
        for (int r = 0; r < kMostRows; ++r) own_rows[r] = r;
        for (int64_t p = 0; p < panels_of(group->total); ++p) {
            const PanelFloats scale(group->scale, group->total, p);
            const char* panel = (const char*)group->down + panel_offset(group->total, depth, args->layout, p);
            const int width = width_of(group->total, p);
            const Target target{scale.values, nullptr, t + p * kColumns * bytes, row_bytes, own_rows, width, width};
            const TilePart parts[2] = {{x.tiles, x.part, x.below, {panel, panel}, tiles_along(depth)}, {}};
            run_tiles<Parts, Products>(tile->rows, parts, &target, 1, &head.needed);
            if constexpr (Parts > 1)
                run_floats<Parts>(is_marked(group->down, p) ? tile->rows : head.floats, head, x, panel, nullptr, nullptr,
                                  target);
        }
        uint32_t needed = head.needed;
        const char* t_rows[kMostRows] = {};
        for (int pass = 0; pass < (Parts > 1 ? 2 : 1); ++pass) {
            // The first pass finds rows of t that need floats; then the rows that do are packed as such.
            if (pass == 1) {
                head = head_of(needed, tile->rows, all);
                pack_floats(x, head, rows, depth);
            }
            for (int64_t i = 0, column = 0; i < args->linears; ++i) {
                const LoraFactors& factors = group->linears[i];
                const Packed<Parts> own(scratch + factors.t, factors.rank);
                for (int r = 0; r < tile->rows; ++r) t_rows[r] = t + r * row_bytes + column * bytes;
                if (pass == 0) needed |= pack_tiles<Parts, used>(own, t_rows, tile->rows, factors.rank);
                if (pass == 1) pack_floats(own, head, t_rows, factors.rank);
                column += factors.rank;
            }
        }
    }
    if (Parts > 1) memcpy(scratch, &head, sizeof head);
}

// One or two neighbouring panels of one linear by one prepared tile.
template <int Parts, int Products>
FS_INLINE void multiply_tile(const LoraArgs* args, const LoraTile& tile, const uint32_t* scratch, int i, int64_t n,
                             int64_t p, int panels, const char* weights, const PanelFloats* bias) {
    const int64_t bytes = bytes_of(args->layout), depth = args->depth;
    const Packed<Parts> x(scratch, depth);
    Head head = {};
    if (Parts > 1) memcpy(&head, scratch, sizeof head);
    const LoraFactors* factors = tile.group < 0 ? nullptr : &args->groups[tile.group].linears[i];
    if (factors && factors->rank == 0) factors = nullptr;
    const Packed<Parts> t(scratch + (factors ? factors->t : 0), factors ? factors->rank : 0);
    TilePart parts[2] = {{x.tiles, x.part, x.below, {}, tiles_along(depth)}, {}};
    if (factors) parts[1] = {t.tiles, t.part, t.below, {}, tiles_along(factors->rank)};
    Target targets[2];
    uint32_t without[2] = {head.needed, head.needed};
    bool in_tiles = false;
    for (int q = 0; q < panels; ++q) {
        parts[0].w[q] = weights + panel_offset(n, depth, args->layout, p + q);
        if (factors) parts[1].w[q] = (const char*)factors->up + panel_offset(n, factors->rank, args->layout, p + q);
        targets[q] = {nullptr, bias[q].values, (char*)args->out[i] + (p + q) * kColumns * bytes, n * bytes, tile.row,
                      width_of(n, p + q), valid_of(n, p + q)};
        if (Parts > 1 && (is_marked(weights, p + q) || (factors && is_marked(factors->up, p + q)))) without[q] = ~0u;
        in_tiles |= head.floats < tile.rows && without[q] != ~0u;
    }
    for (int q = panels; q < 2; ++q) parts[0].w[q] = parts[0].w[0], parts[1].w[q] = parts[1].w[0];
    if (in_tiles || Parts == 1) run_tiles<Parts, Products>(tile.rows, parts, targets, panels, without);
    if constexpr (Parts > 1)
        for (int q = 0; q < panels; ++q)
            run_floats<Parts>(without[q] == ~0u ? tile.rows : head.floats, head, x, parts[0].w[q], factors ? &t : nullptr,
                              parts[1].w[q], targets[q]);
}

template <int Parts, int Products>
static void multiply_tiles(const LoraArgs* args, const LoraTile* tiles, int64_t count, const uint32_t* scratch,
                           int64_t pitch, int64_t begin, int64_t end) {
    const TileRegisters registers;
    bool paired = false;  // the panel before, in tiles of few rows
    int64_t global = begin;
    each_panel(args, begin, end, [&](int i, int64_t n, int64_t p, const char* weights, const float* bias) FS_ALWAYS {
        const bool pairs = !paired && global + 1 < end && width_of(n, p + 1) == kColumns && (p + 2) * kColumns <= padded_columns(n);
        const PanelFloats own[2] = {{bias, n, p}, {pairs ? bias : nullptr, n, pairs ? p + 1 : p}};
        for (int64_t k = 0; k < count; ++k) {
            const bool few = tiles[k].rows <= kTileRowsOf;
            if (few && paired) continue;
            multiply_tile<Parts, Products>(args, tiles[k], scratch + k * pitch, i, n, p, few && pairs ? 2 : 1, weights, own);
        }
        paired = pairs;
        ++global;
    });
}

template <int Parts>
static void prepare_parts(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch) {
    if constexpr (Parts == 1) return prepare_tile<1, 1>(args, tile, scratch);
    if constexpr (Parts == 2) return prepare_tile<2, 4>(args, tile, scratch);
    if constexpr (Parts == 3) {
        const auto chosen = args->products == 6 ? prepare_tile<3, 6> : args->products == 3 ? prepare_tile<3, 3> : prepare_tile<3, 1>;
        chosen(args, tile, scratch);
    }
}

template <int Parts>
static void multiply_parts(const LoraArgs* args, const LoraTile* tiles, int64_t count, const uint32_t* scratch,
                           int64_t pitch, int64_t begin, int64_t end) {
    if constexpr (Parts == 1) return multiply_tiles<1, 1>(args, tiles, count, scratch, pitch, begin, end);
    if constexpr (Parts == 2) return multiply_tiles<2, 4>(args, tiles, count, scratch, pitch, begin, end);
    if constexpr (Parts == 3) {
        const auto chosen = args->products == 6 ? multiply_tiles<3, 6> : args->products == 3 ? multiply_tiles<3, 3> : multiply_tiles<3, 1>;
        chosen(args, tiles, count, scratch, pitch, begin, end);
    }
}

// Four sums that wait for nobody else's.
static float tile_multiply_adds(int64_t rounds) {
    const TileRegisters registers;
    alignas(64) float sums[256];
    zero_tiles();
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t k = 0; k < rounds; ++k) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    return sums[0];
}

template <int Parts>
constexpr LoraKernels tile_kernels(void (*pack)(const void*, int64_t, int64_t, void*, int64_t, int64_t),
                                   void (*unpack)(const void*, int64_t, int64_t, void*, int64_t, int64_t)) {
    return {kMostRows, kTileRowsOf, Packed<Parts>::size, tile_block<Parts>, prepare_parts<Parts>, multiply_parts<Parts>,
            pack,      unpack,      tile_multiply_adds,  4 * 2 * 16 * 16 * 32};
}

const LoraKernels lora_bfloat = tile_kernels<1>(nullptr, nullptr);
const LoraKernels lora_half_parts = tile_kernels<2>(pack_parts<2, uint16_t>, unpack_parts<2, uint16_t>);
const LoraKernels lora_float_parts = tile_kernels<3>(pack_parts<3, uint32_t>, unpack_parts<3, uint32_t>);
