// Compiled once per instruction set: see for_each_isa.h. The two products are written with the compiler's
// vector types, blocked so that their accumulators fill the registers; the rest are loops it vectorises.

template <typename T>
struct VectorOf {
  // may_alias and the element's own alignment: loads from any T*.
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T>& vector_at(T* p) {
  return *reinterpret_cast<Vector<T>*>(p);
}
template <typename T>
inline const Vector<T>& vector_at(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

// Accumulators take R x C registers, C more hold operands: 6 x 4 + 4 of 32, 6 x 2 + 2 of 16.
constexpr int kColumns = kVectorRegisters == 32 ? 4 : 2;

template <typename T, typename S>
void pack_anchors(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, int64_t block) {
  T* packed = sweep.anchors(block);
  const int64_t rows = std::min(kAnchorBlock, p.B - block * kAnchorBlock);
  for (int64_t i = 0; i < kAnchorBlock; ++i) {
    const T* z = p.z + (block * kAnchorBlock + i) * p.D;
    T zero = 0;  // stays 0 as long as every value is finite, else becomes NaN
    for (int64_t d = 0; d < p.D; ++d) zero += i < rows ? T(0) * z[d] : T(0);
    sweep.finite[block * kAnchorBlock + i] = zero == T(0);
    for (int64_t d = 0; d < p.D; ++d) packed[d * kAnchorBlock + i] = (i < rows ? z[d] : T(0)) + zero;
  }
}

// Bank rows [begin, begin + rows) as they count: converted, mapped, normalised, padded with zeros.
template <typename T, typename S>
void load_tile(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, int64_t begin, int64_t rows, T* tile) {
  const int64_t padded = sweep.plan.padded_dim;
  for (int64_t j = 0; j < rows; ++j) {
    const S* u = p.bank + (begin + j) * p.D;
    T* r = tile + j * padded;
    T square = 0;
    if (!sweep.scale.empty()) {
      const T* scale = sweep.scale.data();
      const T* shift = sweep.shift.data();
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < p.D; ++d) {
        r[d] = scale[d] * static_cast<T>(u[d]) + shift[d];
        square += r[d] * r[d];
      }
    } else {
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < p.D; ++d) {
        r[d] = static_cast<T>(u[d]);
        square += r[d] * r[d];
      }
    }
    if (p.renormalize) {
      const T norm = std::sqrt(square);
      const T inverse = T(1) / (norm < static_cast<T>(p.eps) ? static_cast<T>(p.eps) : norm);
#pragma omp simd
      for (int64_t d = 0; d < p.D; ++d) r[d] *= inverse;
    }
    for (int64_t d = p.D; d < padded; ++d) r[d] = T(0);
  }
  const int64_t whole = round_up(rows, kTileUnit);
  for (int64_t k = rows * padded; k < whole * padded; ++k) tile[k] = T(0);
}

// s[R][64], C vectors wide, += rows [R][.] times anchors [depth][64].
template <int R, int C, typename T>
void similarity_kernel(const T* rows, int64_t stride, const T* anchors, int64_t depth, bool first, T* s) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = first ? Vector<T>{} : vector_at(s + r * kAnchorBlock + c * L);
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> z[C];
    for (int c = 0; c < C; ++c) z[c] = vector_at(anchors + k * kAnchorBlock + c * L);
    for (int r = 0; r < R; ++r) {
      const T u = rows[r * stride + k];
      for (int c = 0; c < C; ++c) sum[r][c] += z[c] * u;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) vector_at(s + r * kAnchorBlock + c * L) = sum[r][c];
}

// s[rows][64] = tile [rows][D] times the anchors of a block [D][64].
template <typename T>
void similarities(const T* tile, int64_t rows, int64_t padded, int64_t D, const T* anchors, T* s) {
  constexpr int64_t kDepth = (32 << 10) / (kAnchorBlock * sizeof(T));  // 32 KiB of anchors at a time
  constexpr int kWidth = kColumns * kLanes<T>;
  for (int64_t k = 0; k < D; k += kDepth)
    for (int64_t j = 0; j < rows; j += kTileUnit)
      for (int64_t i = 0; i < kAnchorBlock; i += kWidth)
        similarity_kernel<kTileUnit, kColumns>(tile + j * padded + k, padded, anchors + k * kAnchorBlock + i,
                                               std::min(kDepth, D - k), k == 0, s + j * kAnchorBlock + i);
}

// Sums of a block's anchors over one tile, and which rows of the tile have an active pair.
template <typename T>
struct TileScore {
  T value[kKinds][kAnchorBlock];
  T active[kKinds][kAnchorBlock];
  std::vector<int32_t> rows[kKinds];
  std::vector<char> mixed;  // which rows are not just 64 negatives

  explicit TileScore(int64_t tile_rows) : mixed(tile_rows) {}

  void clear() {
    for (int kind = 0; kind < kKinds; ++kind) {
      std::fill(value[kind], value[kind] + kAnchorBlock, T(0));
      std::fill(active[kind], active[kind] + kAnchorBlock, T(0));
      rows[kind].clear();
    }
  }
};

// A bank row whose label no anchor has: 64 negatives. s becomes their weights.
template <typename T, typename Loss>
void score_negatives(const Loss& loss, int32_t j, T* s, TileScore<T>& score) {
  T* value = score.value[kNegative];
  T* active = score.active[kNegative];
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = 0; i < kAnchorBlock; ++i) {
    const Pair<T> pair = loss.negative(s[i]);
    const bool on = pair.weight != T(0);
    value[i] += pair.value;
    active[i] += on ? T(1) : T(0);
    s[i] = pair.weight;
    any |= on;
  }
  if (any) score.rows[kNegative].push_back(j);
}

// A bank row that is some anchor's positive, or that some anchor must not be paired with.
template <typename T, typename Loss>
void score_mixed(const Loss& loss, int32_t j, int64_t row, int32_t group, const int32_t* anchor_group,
                 const int64_t* exclude, T* s, T* positive_weight, TileScore<T>& score) {
  int any[kKinds] = {0, 0};
  for (int64_t i = 0; i < kAnchorBlock; ++i) {
    const int kind = anchor_group[i] == group ? kPositive : kNegative;
    Pair<T> pair = kind == kPositive ? loss.positive(s[i]) : loss.negative(s[i]);
    if (exclude[i] == row) pair = {T(0), T(0)};
    const bool on = pair.weight != T(0);
    score.value[kind][i] += pair.value;
    score.active[kind][i] += on ? T(1) : T(0);
    s[i] = kind == kNegative ? pair.weight : T(0);
    positive_weight[i] = kind == kPositive ? pair.weight : T(0);
    any[kind] |= on;
  }
  for (int kind = 0; kind < kKinds; ++kind)
    if (any[kind]) score.rows[kind].push_back(j);
}

// Scores a block of anchors against bank rows [begin, begin + rows). The similarities s [rows][64] become the
// weights of the negatives; those of the positives are written for the rows that have one.
template <typename T, typename Loss>
void score_tile(Sweep<T>& sweep, const Loss& loss, int64_t block, int64_t begin, int64_t rows, const int32_t* row_group,
                T* s, T* positive_weight, TileScore<T>& score) {
  const int32_t* anchor_group = sweep.anchor_group.data() + block * kAnchorBlock;
  const int64_t* exclude = sweep.exclude.data() + block * kAnchorBlock;
  score.clear();
  for (int64_t j = 0; j < rows; ++j) score.mixed[j] = row_group[j] != kNoAnchor;
  for (int64_t i = 0; i < kAnchorBlock; ++i)
    if (begin <= exclude[i] && exclude[i] < begin + rows) score.mixed[exclude[i] - begin] = 1;
  for (int64_t j = 0; j < rows; ++j) {
    T* row = s + j * kAnchorBlock;
    if (score.mixed[j])
      score_mixed(loss, static_cast<int32_t>(j), begin + j, row_group[j], anchor_group, exclude, row,
                  positive_weight + j * kAnchorBlock, score);
    else
      score_negatives(loss, static_cast<int32_t>(j), row, score);
  }
}

// grad[R][.], C vectors wide, += weights [.][64] transposed times the listed rows of the tile.
template <int R, int C, typename T>
void gradient_kernel(const T* weights, const T* tile, int64_t padded, const int32_t* list, int64_t n, T* grad) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = vector_at(grad + r * padded + c * L);
  for (int64_t k = 0; k < n; ++k) {
    const T* row = tile + list[k] * padded;
    const T* w = weights + list[k] * kAnchorBlock;
    Vector<T> u[C];
    for (int c = 0; c < C; ++c) u[c] = vector_at(row + c * L);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] += u[c] * w[r];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) vector_at(grad + r * padded + c * L) = sum[r][c];
}

template <int C, typename T>
void gradient_columns(const T* weights, const T* tile, int64_t padded, const std::vector<int32_t>& list, T* grad) {
  constexpr int R = 6;
  const int64_t n = static_cast<int64_t>(list.size());
  int64_t i = 0;
  for (; i + R <= kAnchorBlock; i += R)
    gradient_kernel<R, C>(weights + i, tile, padded, list.data(), n, grad + i * padded);
  constexpr int kRest = kAnchorBlock % R;
  gradient_kernel<kRest, C>(weights + i, tile, padded, list.data(), n, grad + i * padded);
}

// grad [64][padded] += weights [rows][64] transposed times tile [rows][padded], over the listed rows.
template <typename T>
void add_gradient(const T* weights, const T* tile, int64_t padded, const std::vector<int32_t>& list, T* grad) {
  constexpr int L = kLanes<T>;
  int64_t d = 0;
  for (; d + kColumns * L <= padded; d += kColumns * L)
    gradient_columns<kColumns>(weights, tile + d, padded, list, grad + d);
  for (; d < padded; d += L) gradient_columns<1>(weights, tile + d, padded, list, grad + d);
}

// The anchors of a group against the bank rows of a split.
template <typename T, typename S, typename Loss>
void sweep_unit(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, const Loss& loss, int64_t group, int64_t split) {
  const SweepPlan& plan = sweep.plan;
  const int64_t first_block = group * plan.group_blocks;
  const int64_t last_block = std::min(first_block + plan.group_blocks, plan.blocks);
  const int64_t end = std::min((split + 1) * plan.split_rows, sweep.count);

  Workspace<T> tile(plan.tile_rows * plan.padded_dim);
  Workspace<T> weights(kKinds * plan.tile_rows * kAnchorBlock);
  T* s = weights.data();
  T* positive_weight = s + plan.tile_rows * kAnchorBlock;
  std::vector<int32_t> row_group(plan.tile_rows);
  TileScore<T> score(plan.tile_rows);

  for (int64_t begin = split * plan.split_rows; begin < end; begin += plan.tile_rows) {
    const int64_t rows = std::min(plan.tile_rows, end - begin);
    load_tile(p, sweep, begin, rows, tile.data());
    for (int64_t j = 0; j < rows; ++j) row_group[j] = sweep.find_group(p.bank_labels[begin + j]);

    for (int64_t block = first_block; block < last_block; ++block) {
      similarities(tile.data(), round_up(rows, kTileUnit), plan.padded_dim, p.D, sweep.anchors(block), s);
      score_tile(sweep, loss, block, begin, rows, row_group.data(), s, positive_weight, score);
      for (int kind = 0; kind < kKinds; ++kind) {
        RowSums* sums = sweep.sums(split, kind, block);
        for (int64_t i = 0; i < kAnchorBlock; ++i) {
          sums[i].value += static_cast<double>(score.value[kind][i]);
          sums[i].active += static_cast<double>(score.active[kind][i]);
        }
        if (p.grad_z == nullptr || score.rows[kind].empty()) continue;
        T* grad = sweep.grad(split, kind, block);
        char& touched = sweep.touched(split, kind, block);
        if (!touched) std::fill(grad, grad + kAnchorBlock * plan.padded_dim, T(0));
        touched = 1;
        add_gradient(kind == kNegative ? s : positive_weight, tile.data(), plan.padded_dim, score.rows[kind], grad);
      }
    }
  }
}

// grad_z of one anchor: the splits of each kind, in order, times the kind's factor. NaN for an anchor that is not
// finite, so that whoever looks at gradients only, as a gradient scaler does, sees it.
template <typename T, typename S>
void reduce_gradient(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, const T* factor, int64_t i) {
  T* out = p.grad_z + i * p.D;
  std::fill(out, out + p.D, sweep.finite[i] ? T(0) : std::numeric_limits<T>::quiet_NaN());
  if (!sweep.finite[i]) return;
  if (p.anchors != nullptr && !p.anchors[i]) return;
  const int64_t block = i / kAnchorBlock, row = i % kAnchorBlock;
  for (int kind = 0; kind < kKinds; ++kind)
    for (int64_t split = 0; split < sweep.plan.splits; ++split) {
      if (!sweep.touched(split, kind, block)) continue;
      const T* grad = sweep.grad(split, kind, block) + row * sweep.plan.padded_dim;
#pragma omp simd
      for (int64_t d = 0; d < p.D; ++d) out[d] += factor[kind] * grad[d];
    }
}
