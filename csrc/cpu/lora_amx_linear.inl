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

// t = x A^T * scale of all linears, as rows.
template <int Parts, int Products>
static void shrink(const LoraArgs* args, const LoraGroup& group, int rows, const Packed<Parts>& x, const Head& head,
                   char* t, int64_t row_bytes) {
    int64_t own_rows[kMostRows];
    for (int r = 0; r < kMostRows; ++r) own_rows[r] = r;
    for (int64_t p = 0; p < panels_of(group.total); ++p) {
        const PanelFloats scale(group.scale, group.total, p);
        const char* panel = (const char*)group.down + panel_offset(group.total, args->depth, args->layout, p);
        const int width = width_of(group.total, p);
        char* out = t + p * kColumns * bytes_of(args->layout);
        const Target target{scale.values, nullptr, out, row_bytes, own_rows, width, width};
        const TilePart parts[2] = {{x.tiles, x.part, x.below, {panel, panel}, tiles_along(args->depth)}, {}};
        run_tiles<Parts, Products>(rows, parts, &target, 1, &head.needed);
        if constexpr (Parts > 1) {
            const int in_floats = is_marked(group.down, p) ? rows : head.floats;
            run_floats<Parts>(in_floats, head, x, panel, nullptr, nullptr, target);
        }
    }
}

// visit(where linear i's rows of t go, their first value, its rank) of every linear.
template <int Parts, class Visit>
FS_INLINE void each_t(const LoraArgs* args, const LoraGroup& group, uint32_t* scratch, char* t, Visit visit) {
    for (int i = 0; i < args->linears; ++i) {
        const LoraFactors& factors = group.linears[i];
        visit(Packed<Parts>(scratch + factors.t, factors.rank), t, factors.rank);
        t += factors.rank * bytes_of(args->layout);
    }
}

FS_INLINE void rows_of(const char* (&rows)[kMostRows], const char* first, int64_t row_bytes) {
    for (int r = 0; r < kMostRows; ++r) rows[r] = first + r * row_bytes;
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
        shrink<Parts, Products>(args, *group, tile->rows, x, head, t, row_bytes);
        uint32_t needed = head.needed;
        const char* t_rows[kMostRows];
        each_t<Parts>(args, *group, scratch, t, [&](const Packed<Parts>& own, const char* first, int64_t rank) {
            rows_of(t_rows, first, row_bytes);
            needed |= pack_tiles<Parts, used>(own, t_rows, tile->rows, rank);
        });
        if (needed != head.needed) {
            head = head_of(needed, tile->rows, all);
            pack_floats(x, head, rows, depth);
        }
        if (head.packed > 0)
            each_t<Parts>(args, *group, scratch, t, [&](const Packed<Parts>& own, const char* first, int64_t rank) {
                rows_of(t_rows, first, row_bytes);
                pack_floats(own, head, t_rows, rank);
            });
    }
    if (Parts > 1) memcpy(scratch, &head, sizeof head);
}

// One panel of linear i, or two neighbouring ones.
struct Panels {
    int i;
    int64_t n, first;
    const char* weights;
    PanelFloats bias[2];
};

constexpr uint32_t kEveryRow = ~0u;

template <int Parts, int Products>
static void multiply_tile(const LoraArgs* args, const LoraTile& tile, const uint32_t* scratch, const Panels& panels,
                          int count) {
    const int64_t bytes = bytes_of(args->layout), depth = args->depth, n = panels.n;
    const Packed<Parts> x(scratch, depth);
    Head head = {};
    if (Parts > 1) memcpy(&head, scratch, sizeof head);
    const LoraFactors* factors = tile.group < 0 ? nullptr : &args->groups[tile.group].linears[panels.i];
    if (factors && factors->rank == 0) factors = nullptr;
    const Packed<Parts> t(scratch + (factors ? factors->t : 0), factors ? factors->rank : 0);
    TilePart parts[2] = {{x.tiles, x.part, x.below, {}, tiles_along(depth)}, {}};
    if (factors) parts[1] = {t.tiles, t.part, t.below, {}, tiles_along(factors->rank)};
    Target targets[2];
    uint32_t without[2] = {head.needed, head.needed};
    bool in_tiles = Parts == 1;
    for (int q = 0; q < count; ++q) {
        const int64_t p = panels.first + q;
        parts[0].w[q] = panels.weights + panel_offset(n, depth, args->layout, p);
        if (factors) parts[1].w[q] = (const char*)factors->up + panel_offset(n, factors->rank, args->layout, p);
        char* out = (char*)args->out[panels.i] + p * kColumns * bytes;
        targets[q] = {nullptr, panels.bias[q].values, out, n * bytes, tile.row, width_of(n, p), valid_of(n, p)};
        if (Parts > 1 && (is_marked(panels.weights, p) || (factors && is_marked(factors->up, p)))) without[q] = kEveryRow;
        in_tiles |= head.floats < tile.rows && without[q] != kEveryRow;
    }
    if (count == 1)
        for (TilePart& part : parts) part.w[1] = part.w[0];
    if (in_tiles) run_tiles<Parts, Products>(tile.rows, parts, targets, count, without);
    if constexpr (Parts > 1)
        for (int q = 0; q < count; ++q)
            run_floats<Parts>(without[q] == kEveryRow ? tile.rows : head.floats, head, x, parts[0].w[q],
                              factors ? &t : nullptr, parts[1].w[q], targets[q]);
}

// Tiles of few rows take full panels in pairs.
template <int Parts, int Products>
static void multiply_tiles(const LoraArgs* args, const LoraTile* tiles, int64_t count, const uint32_t* scratch,
                           int64_t pitch, int64_t begin, int64_t end) {
    const TileRegisters registers;
    bool second = false;
    int64_t left = end - begin;
    each_panel(args, begin, end, [&](int i, int64_t n, int64_t p, const char* weights, const float* bias) FS_ALWAYS {
        const bool pair = !second && left > 1 && (p + 2) * kColumns <= padded_columns(n);
        const PanelFloats none(nullptr, n, p);
        const Panels panels{i, n, p, weights, {{bias, n, p}, pair ? PanelFloats(bias, n, p + 1) : none}};
        for (int64_t k = 0; k < count; ++k) {
            const bool few = tiles[k].rows <= kTileSide;
            if (few && second) continue;
            multiply_tile<Parts, Products>(args, tiles[k], scratch + k * pitch, panels, few && pair ? 2 : 1);
        }
        second = pair;
        --left;
    });
}

template <int Parts>
static void prepare_parts(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch) {
    if constexpr (Parts == 1) return prepare_tile<1, 1>(args, tile, scratch);
    if constexpr (Parts == 2) return prepare_tile<2, 4>(args, tile, scratch);
    if constexpr (Parts == 3) {
        if (args->products == 6) return prepare_tile<3, 6>(args, tile, scratch);
        if (args->products == 3) return prepare_tile<3, 3>(args, tile, scratch);
        return prepare_tile<3, 1>(args, tile, scratch);
    }
}

template <int Parts>
static void multiply_parts(const LoraArgs* args, const LoraTile* tiles, int64_t count, const uint32_t* scratch,
                           int64_t pitch, int64_t begin, int64_t end) {
    if constexpr (Parts == 1) return multiply_tiles<1, 1>(args, tiles, count, scratch, pitch, begin, end);
    if constexpr (Parts == 2) return multiply_tiles<2, 4>(args, tiles, count, scratch, pitch, begin, end);
    if constexpr (Parts == 3) {
        if (args->products == 6) return multiply_tiles<3, 6>(args, tiles, count, scratch, pitch, begin, end);
        if (args->products == 3) return multiply_tiles<3, 3>(args, tiles, count, scratch, pitch, begin, end);
        return multiply_tiles<3, 1>(args, tiles, count, scratch, pitch, begin, end);
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
    return {kMostRows, kTileSide, Packed<Parts>::size, tile_block<Parts>, prepare_parts<Parts>, multiply_parts<Parts>,
            pack,      unpack,      tile_multiply_adds,  4 * 2 * 16 * 16 * 32};
}

const LoraKernels lora_bfloat = tile_kernels<1>(nullptr, nullptr);
const LoraKernels lora_half_parts = tile_kernels<2>(pack_parts<2, uint16_t>, unpack_parts<2, uint16_t>);
const LoraKernels lora_float_parts = tile_kernels<3>(pack_parts<3, uint32_t>, unpack_parts<3, uint32_t>);
