// fluxc's ops on the CPU for processes without Python: what an AOTI package calls. Schemas as in kernels/schemas.py.
//
// Attention takes CHUNK rows at a time over the keys they can see: memory grows with the keys, never with their square.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t CHUNK = 256;
constexpr int64_t PAGE = 64;

// What rows see: all keys j <= i, or with a window the streaming set; rows [low, high) always all.
struct Rows {
  double scale, softcap = 0;
  int64_t sink = 0, window = 0, low = 0, high = 0;
};

// Attention of q [Hk,G,C,D] over k, v [Hk,1,T,D] where visible [C,T] -> [Hk,G,C,D]; sinks [Hk,G] are logits.
Tensor piece(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visible, const Rows& rows,
             const OptionalTensor& sinks) {
  const auto hidden = at::zeros(visible.sizes(), q.options())
                          .masked_fill_(visible.logical_not(), -std::numeric_limits<double>::infinity());
  if (rows.softcap == 0 && !sinks && k.size(3) == v.size(3)) {
    const auto all = [&](const Tensor& x) { return x.expand({-1, q.size(1), -1, -1}); };
    const auto mask = hidden.unsqueeze(0).unsqueeze(0);
    return std::get<0>(
        at::_scaled_dot_product_flash_attention_for_cpu(q, all(k), all(v), 0.0, false, mask, rows.scale));
  }
  auto scores = at::matmul(q.to(at::kFloat) * rows.scale, k.to(at::kFloat).transpose(2, 3));
  if (rows.softcap != 0) scores = at::tanh(scores / rows.softcap) * rows.softcap;
  scores = scores + hidden.to(at::kFloat);
  const auto keys = k.size(2);
  if (sinks) {
    const auto extra = sinks->to(at::kFloat).unsqueeze(2).unsqueeze(3).expand({-1, -1, q.size(2), 1});
    scores = at::cat({scores, extra}, 3);
  }
  return at::matmul(at::softmax(scores, 3).narrow(3, 0, keys), v.to(at::kFloat)).to(q.scalar_type());
}

Tensor joined(const Tensor& x, int64_t sink, int64_t first, int64_t end) {
  if (first <= sink) return x.slice(2, 0, end);
  return at::cat({x.slice(2, 0, sink), x.slice(2, first, end)}, 2);
}

// One request: q [H,S,D], k, v [Hk,T,D], row 0 at position begin -> [S,H,Dv].
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, int64_t begin, const Rows& rows,
              const OptionalTensor& sink_logits) {
  const auto heads = k.size(0), group = q.size(0) / heads, count = q.size(1);
  const auto queries = q.contiguous().view({heads, group, count, q.size(2)});
  const auto keys = k.contiguous().unsqueeze(1), values = v.contiguous().unsqueeze(1);
  const auto sinks = sink_logits ? OptionalTensor(sink_logits->view({heads, group})) : std::nullopt;
  std::vector<Tensor> parts;
  for (int64_t at_row = 0; at_row < count; at_row += CHUNK) {
    const auto size = std::min(CHUNK, count - at_row), start = begin + at_row, end = start + size;
    const bool dense = rows.window == 0 || (rows.low < end && start < rows.high);
    const auto first = dense ? 0 : std::max<int64_t>(0, start - rows.window + 1);
    const auto sink = dense ? 0 : rows.sink;
    const auto i = at::arange(start, end, at::kLong).unsqueeze(1);
    const auto j = joined(at::arange(end, at::kLong).view({1, 1, -1}), sink, first, end).view({1, -1});
    auto visible = j <= i;
    if (rows.window != 0) {
      const auto all = (i >= rows.low).logical_and(i < rows.high);
      visible = visible.logical_and((j < rows.sink).logical_or(i - j < rows.window).logical_or(all));
    }
    const auto part = queries.slice(2, at_row, at_row + size);
    parts.push_back(piece(part, joined(keys, sink, first, end), joined(values, sink, first, end), visible, rows, sinks));
  }
  return at::cat(parts, 2).permute({2, 0, 1, 3}).reshape({count, q.size(0), v.size(2)});
}

template <typename RowsOf>
Tensor each_request(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_start,
                    const OptionalTensor& sink_logits, RowsOf rows_of) {
  std::vector<Tensor> out;
  for (int64_t b = 0; b < q.size(0); ++b) {
    const auto begin = q_start ? (*q_start)[b].item<int64_t>() : 0;
    out.push_back(attend(q[b], k[b], v[b], begin, rows_of(b), sink_logits));
  }
  return at::stack(out);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t, int64_t window,
                 double softcap, const OptionalTensor& sink_logits, const OptionalTensor& q_start) {
  return each_request(q, k, v, q_start, sink_logits, [&](int64_t) { return Rows{scale, softcap, 0, window}; });
}

Tensor streaming_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t, int64_t sink,
                           int64_t window, double softcap, const OptionalTensor& sink_logits,
                           const OptionalTensor& q_start) {
  return each_request(q, k, v, q_start, sink_logits, [&](int64_t) { return Rows{scale, softcap, sink, window}; });
}

Tensor triangle_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prompt_lens, double scale,
                          int64_t, int64_t sink, int64_t window, int64_t last, bool decode_full, double softcap,
                          const OptionalTensor& sink_logits) {
  return each_request(q, k, v, std::nullopt, sink_logits, [&](int64_t b) {
    const auto prompt = prompt_lens[b].item<int64_t>();
    return Rows{scale, softcap, sink, window, std::max<int64_t>(0, prompt - last), decode_full ? q.size(2) : prompt};
  });
}

Tensor router_pool(const Tensor& q, const Tensor& prompt_lens, int64_t pool) {
  std::vector<Tensor> out;
  for (int64_t b = 0; b < q.size(0); ++b) {
    const auto n = prompt_lens[b].item<int64_t>();
    TORCH_CHECK(n >= 1 && n <= q.size(2), "fluxc::router_pool: prompt_lens must lie in 1..", q.size(2));
    const auto rows = at::cat({q[b].slice(1, 0, std::min(pool, n)), q[b].slice(1, std::max<int64_t>(0, n - pool), n)}, 1);
    out.push_back(rows.to(at::kFloat).mean(at::IntArrayRef{0, 1}));
  }
  return at::stack(out);
}

void kv_write(Tensor cache, const Tensor& k, const Tensor& v, const Tensor& slots) {
  const auto kept = slots >= 0;
  const auto where = slots.masked_select(kept);
  TORCH_CHECK(where.numel() == 0 || where.max().item<int64_t>() < cache.size(0) * PAGE,
              "fluxc::kv_write: slots must lie in -1..", cache.size(0) * PAGE - 1);
  const auto page = where.div(PAGE, "floor"), offset = where.remainder(PAGE);
  int64_t side = 0;
  for (const auto& x : {k, v}) {
    auto half = cache.select(1, side++).transpose(1, 2);
    half.index_put_({page, offset}, x.transpose(1, 2).index({kept}));
  }
}

// Keys and values [2,Hk,slots,D] of a request, in slot order.
Tensor gather(const Tensor& cache, const Tensor& pages, int64_t slots) {
  const auto own = pages.slice(0, 0, (slots + PAGE - 1) / PAGE).to(at::kLong);
  return cache.index_select(0, own).permute({1, 2, 0, 3, 4}).flatten(2, 3).slice(2, 0, slots);
}

Tensor decode_attention(const Tensor& q, const Tensor& cache, const Tensor& page_table, const Tensor& lens,
                        double scale, int64_t, double softcap, const OptionalTensor& sink_logits) {
  auto out = at::zeros(q.sizes(), q.options());
  for (int64_t b = 0; b < q.size(0); ++b) {
    const auto slots = static_cast<int64_t>(lens[b].item<int32_t>());
    if (slots == 0) continue;
    const auto kv = gather(cache, page_table[b], slots);
    out[b].copy_(attend(q[b].unsqueeze(1), kv[0], kv[1], slots - 1, Rows{scale, softcap}, sink_logits)[0]);
  }
  return out;
}

Tensor append_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache,
                        const Tensor& page_table, const Tensor& lens, const Tensor& start, const Tensor& sinks,
                        const Tensor& windows, double scale, int64_t, double softcap,
                        const OptionalTensor& sink_logits) {
  std::vector<Tensor> out;
  for (int64_t b = 0; b < q.size(0); ++b) {
    const auto slots = static_cast<int64_t>(lens[b].item<int32_t>());
    const auto begin = start[b].item<int64_t>(), sink = sinks[b].item<int64_t>(), window = windows[b].item<int64_t>();
    auto old = gather(cache, page_table[b], slots);
    if (window != 0 && begin > sink + window) {  // a ring that wrapped is turned back
      const auto oldest = sink + (begin - sink) % window;
      old = at::cat({old.slice(2, 0, sink), old.slice(2, oldest), old.slice(2, sink, oldest)}, 2);
    }
    const auto keys = at::cat({old[0], k[b]}, 1), values = at::cat({old[1], v[b]}, 1);
    out.push_back(attend(q[b], keys, values, slots, Rows{scale, softcap, sink, window}, sink_logits));
  }
  return at::stack(out);
}

Tensor grouped_mm(const Tensor& x, const Tensor& weight, const Tensor& ends) {
  auto out = at::empty({x.size(0), weight.size(2)}, x.options());
  int64_t begin = 0;
  for (int64_t e = 0; e < weight.size(0); ++e) {
    const auto end = static_cast<int64_t>(ends[e].item<int32_t>());
    if (end > begin) out.slice(0, begin, end).copy_(at::matmul(x.slice(0, begin, end), weight[e]));
    begin = end;
  }
  return out;
}

}  // namespace

TORCH_LIBRARY(fluxc, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, *, float scale, int layer, int window=0, float softcap=0., "
        "Tensor? sink_logits=None, Tensor? q_start=None) -> Tensor");
  m.def("streaming_attention(Tensor q, Tensor k, Tensor v, *, float scale, int layer, int sink, int window, "
        "float softcap=0., Tensor? sink_logits=None, Tensor? q_start=None) -> Tensor");
  m.def("triangle_attention(Tensor q, Tensor k, Tensor v, Tensor prompt_lens, *, float scale, int layer, int sink, "
        "int window, int last, bool decode_full=False, float softcap=0., Tensor? sink_logits=None) -> Tensor");
  m.def("router_pool(Tensor q, Tensor prompt_lens, *, int pool) -> Tensor");
  m.def("kv_write(Tensor(a!) cache, Tensor k, Tensor v, Tensor slots) -> ()");
  m.def("decode_attention(Tensor q, Tensor cache, Tensor page_table, Tensor lens, *, float scale, int layer, "
        "float softcap=0., Tensor? sink_logits=None) -> Tensor");
  m.def("append_attention(Tensor q, Tensor k, Tensor v, Tensor cache, Tensor page_table, Tensor lens, Tensor start, "
        "Tensor sinks, Tensor windows, *, float scale, int layer, float softcap=0., Tensor? sink_logits=None) -> Tensor");
  m.def("grouped_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor");
}

TORCH_LIBRARY_IMPL(fluxc, CompositeExplicitAutograd, m) {
  m.impl("attention", attention);
  m.impl("streaming_attention", streaming_attention);
  m.impl("triangle_attention", triangle_attention);
  m.impl("router_pool", router_pool);
  m.impl("kv_write", kv_write);
  m.impl("decode_attention", decode_attention);
  m.impl("append_attention", append_attention);
  m.impl("grouped_mm", grouped_mm);
}
