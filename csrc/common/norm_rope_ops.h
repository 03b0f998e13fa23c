// qk_norm_rope and joint_qk_norm_rope as ops: both hand a list of tensors of heads to a device.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "heads.h"

namespace fastdistill {

// The gradient of a weight that a part of a backward pass adds up, where there is one.
struct NormRopePart {
    NormRopeBackward arguments;
    Tensor* dweight;
};

// Queries, keys and values of one stream: three tensors, or one (B, S, 3, H, d) in the first.
struct HeadStream {
    const Tensor& first;
    const std::optional<Tensor>&second, &third;
    const char* name;

    bool packed() const { return !second.has_value(); }
    const Tensor& tensor(int which) const {
        return packed() || which == 0 ? first : which == 1 ? *second : *third;
    }
    Heads heads(int which) const {
        return packed() ? packed_heads(first, which, name) : heads_of(tensor(which), name);
    }
};

// Device::forward(like, weight, parts, eps, adjacent) and Device::backward(like, weight, parts, eps,
// adjacent), where `like` and `weight` have the dtypes of all tensors and of all weights, and
// Device::new_result(like, sizes).
template <class Device>
struct NormRopeOps {
    using Optional = std::optional<Tensor>;

    static NormRopeForward forward_part(const Tensor& x, const Heads& heads, const void* weight,
                                        const RopeTable& table, Tensor& out, const Heads& out_heads) {
        return {heads.operand(x), weight,       table,       out_heads.result(out),
                heads.batch,      heads.tokens, heads.heads, heads.size};
    }

    static NormRopePart backward_part(const Tensor& grad, const Heads& grad_heads, const HeadOperand& x,
                                      const Heads& heads, const void* weight, const RopeTable& table,
                                      Tensor& dx, const Heads& dx_heads, Tensor* dweight) {
        check_same_heads(grad_heads, heads, "grad");
        return {{grad_heads.operand(grad), x, weight, table, dx_heads.result(dx), nullptr, heads.batch,
                 heads.tokens, heads.heads, heads.size},
                dweight};
    }

    static Tensor new_dweight(const Tensor& weight, bool wanted) {
        return wanted ? torch::stable::new_empty(weight, weight.sizes()) : nothing_like(weight);
    }

    static void check_beside(const Heads& heads, const Heads& q, const char* name) {
        STD_TORCH_CHECK(heads.batch == q.batch && heads.tokens == q.tokens && heads.size == q.size, name,
                        ": expected the batch, tokens and head size of q");
    }

    static std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                                   const Tensor& k_weight, const Optional& cos,
                                                   const Optional& sin, double eps, bool adjacent) {
        const Heads q_heads = heads_of(q, "q"), k_heads = heads_of(k, "k");
        check_beside(k_heads, q_heads, "k");
        check_like(k, q, "k");
        const RopeTable table = rope_table(cos, sin, q, q_heads.tokens, q_heads.size);
        const auto weight = [&](const Tensor& w, const char* name) {
            return head_weight(w, q_weight, q, q_heads.size, name);
        };
        Tensor out_q = Device::new_result(q, q.sizes()), out_k = Device::new_result(k, k.sizes());
        Device::forward(
            q, q_weight,
            {forward_part(q, q_heads, weight(q_weight, "q_weight"), table, out_q, heads_of(out_q, "q")),
             forward_part(k, k_heads, weight(k_weight, "k_weight"), table, out_k, heads_of(out_k, "k"))},
            eps, adjacent);
        return {out_q, out_k};
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
        const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k, const Tensor& q_weight,
        const Tensor& k_weight, const Optional& cos, const Optional& sin, double eps, bool adjacent,
        bool weight_grads) {
        const Heads q_heads = heads_of(q, "q"), k_heads = heads_of(k, "k");
        check_beside(k_heads, q_heads, "k");
        check_like(k, q, "k");
        check_like(grad_q, q, "grad_q");
        check_like(grad_k, q, "grad_k");
        const RopeTable table = rope_table(cos, sin, q, q_heads.tokens, q_heads.size);
        const auto weight = [&](const Tensor& w, const char* name) {
            return head_weight(w, q_weight, q, q_heads.size, name);
        };
        Tensor dq = Device::new_result(q, q.sizes()), dk = Device::new_result(k, k.sizes());
        Tensor dq_weight = new_dweight(q_weight, weight_grads),
               dk_weight = new_dweight(k_weight, weight_grads);
        Device::backward(q, q_weight,
                         {backward_part(grad_q, heads_of(grad_q, "grad_q"), q_heads.operand(q), q_heads,
                                        weight(q_weight, "q_weight"), table, dq, heads_of(dq, "q"),
                                        weight_grads ? &dq_weight : nullptr),
                          backward_part(grad_k, heads_of(grad_k, "grad_k"), k_heads.operand(k), k_heads,
                                        weight(k_weight, "k_weight"), table, dk, heads_of(dk, "k"),
                                        weight_grads ? &dk_weight : nullptr)},
                         eps, adjacent);
        return {dq, dk, dq_weight, dk_weight};
    }

    static std::tuple<Tensor, Tensor, Tensor> joint_qk_norm_rope(
        const Tensor& text_q, const Optional& text_k, const Optional& text_v, const Tensor& image_q,
        const Optional& image_k, const Optional& image_v, const Tensor& text_q_weight,
        const Tensor& text_k_weight, const Tensor& image_q_weight, const Tensor& image_k_weight,
        const Optional& cos, const Optional& sin, double eps, bool adjacent) {
        const HeadStream streams[] = {{text_q, text_k, text_v, "text"}, {image_q, image_k, image_v, "image"}};
        const Tensor* const weights[][2] = {{&text_q_weight, &text_k_weight},
                                            {&image_q_weight, &image_k_weight}};
        const int64_t text_tokens = text_q.size(1), tokens = text_tokens + image_q.size(1);
        std::array<Tensor, 3> out;
        std::vector<NormRopeForward> parts;
        for (int which = 0; which < 3; ++which) {
            const Heads of = streams[1].heads(which);
            const int64_t sizes[] = {of.batch, tokens, of.heads, of.size};
            out[which] = Device::new_result(image_q, {sizes, 4});
        }
        for (int stream = 0; stream < 2; ++stream)
            for (int which = 0; which < 3; ++which) {
                const HeadStream& s = streams[stream];
                const Tensor& x = s.tensor(which);
                const Heads heads = s.heads(which), all = heads_of(out[which], "out");
                const int64_t first = stream == 0 ? 0 : text_tokens;
                const Heads part = all.part(first, s.first.size(1));
                check_like(x, image_q, s.name);
                check_same_heads(heads, part, s.name);
                const bool value = which == 2;
                parts.push_back(forward_part(
                    x, heads,
                    value ? nullptr
                          : head_weight(*weights[stream][which], text_q_weight, image_q, heads.size, s.name),
                    value ? RopeTable{} : rope_table(cos, sin, image_q, tokens, heads.size, first),
                    out[which], part));
            }
        Device::forward(image_q, text_q_weight, parts, eps, adjacent);
        return {out[0], out[1], out[2]};
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
    joint_qk_norm_rope_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                                const Tensor& text_q, const Optional& text_k, const Tensor& image_q,
                                const Optional& image_k, const Tensor& text_q_weight,
                                const Tensor& text_k_weight, const Tensor& image_q_weight,
                                const Tensor& image_k_weight, const Optional& cos, const Optional& sin,
                                double eps, bool adjacent, bool weight_grads) {
        const Tensor* const grads[] = {&grad_q, &grad_k, &grad_v};
        // The values themselves are not needed: what is asked of them is never more than their packed place.
        const HeadStream streams[] = {{text_q, text_k, text_k, "text"}, {image_q, image_k, image_k, "image"}};
        const Tensor* const weights[][2] = {{&text_q_weight, &text_k_weight},
                                            {&image_q_weight, &image_k_weight}};
        const int64_t text_tokens = text_q.size(1), tokens = text_tokens + image_q.size(1);
        std::array<std::array<Tensor, 3>, 2> dx;
        std::array<std::array<Tensor, 2>, 2> dweight;
        std::vector<NormRopePart> parts;
        for (int stream = 0; stream < 2; ++stream)
            for (int which = 0; which < 3; ++which) {
                const HeadStream& s = streams[stream];
                const bool value = which == 2;
                const Heads all = heads_of(*grads[which], "grad");
                STD_TORCH_CHECK(all.tokens == tokens, "grad: expected the tokens of both streams");
                check_like(*grads[which], image_q, "grad");
                check_like(s.tensor(which), image_q, s.name);
                const int64_t first = stream == 0 ? 0 : text_tokens;
                const Heads grad = all.part(first, s.first.size(1));
                const Heads heads = value && !s.packed() ? grad : s.heads(which);
                Tensor& target = dx[stream][s.packed() ? 0 : which];
                const int64_t sizes[] = {heads.batch, heads.tokens, heads.heads, heads.size};
                if (s.packed() && which == 0) target = Device::new_result(image_q, s.first.sizes());
                if (s.packed() && which > 0) dx[stream][which] = nothing_like(image_q);
                if (!s.packed()) target = Device::new_result(image_q, {sizes, 4});
                if (!value) dweight[stream][which] = new_dweight(*weights[stream][which], weight_grads);
                parts.push_back(backward_part(
                    *grads[which], grad, value ? grad.operand(*grads[which]) : heads.operand(s.tensor(which)),
                    heads,
                    value ? nullptr
                          : head_weight(*weights[stream][which], text_q_weight, image_q, heads.size, s.name),
                    value ? RopeTable{} : rope_table(cos, sin, image_q, tokens, heads.size, first), target,
                    s.packed() ? packed_heads(target, which, s.name) : heads_of(target, s.name),
                    value || !weight_grads ? nullptr : &dweight[stream][which]));
            }
        Device::backward(image_q, text_q_weight, parts, eps, adjacent);
        return {dx[0][0], dx[0][1],      dx[0][2],      dx[1][0],      dx[1][1],
                dx[1][2], dweight[0][0], dweight[0][1], dweight[1][0], dweight[1][1]};
    }

    static void implement(torch::stable::detail::StableLibrary& m) {
        m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
        m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
        m.impl("joint_qk_norm_rope", TORCH_BOX(&joint_qk_norm_rope));
        m.impl("joint_qk_norm_rope_backward", TORCH_BOX(&joint_qk_norm_rope_backward));
    }
};

}  // namespace fastdistill
