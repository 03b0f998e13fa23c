// modulate, modulate_for_two and gated_residual_modulate as ops. They differ by what the adaptive layer norm
// stands behind; a device runs it, once each way.
#pragma once

#include <tuple>

#include "rows.h"

namespace fastdistill {

// What gated_residual_modulate has beside modulate.
struct AdalnResidual {
    const Tensor &y, &gate;
    double clip;
};

struct AdalnResult {
    Tensor h, out, stats;
};

// What their backward has beside that of modulate: a second gradient of out, or what follows from h.
struct AdalnOther {
    const Tensor &grad, &y, &gate;
    double clip;
};

struct AdalnGradients {
    Tensor dx, dy, dgate, dscale, dshift;
};

template <bool RESIDUAL>
AdalnResult new_adaln_result(const Tensor& x, const Rows& rows, const Tensor& gate, const Tensor& scale,
                             const Tensor& shift) {
    STD_TORCH_CHECK(gate.scalar_type() == scale.scalar_type(), "gate: expected the dtype of scale");
    STD_TORCH_CHECK(shift.scalar_type() == scale.scalar_type(), "shift: expected the dtype of scale");
    const auto like_x = [&] { return torch::stable::new_empty(x, x.sizes()); };
    return {RESIDUAL ? like_x() : x, like_x(), new_stats(x, rows)};
}

template <bool RESIDUAL>
AdalnGradients new_adaln_gradients(const Tensor& x, const Tensor& scale, bool modulation_grads) {
    const auto like = [](const Tensor& t, bool wanted) {
        return wanted ? torch::stable::new_empty(t, t.sizes()) : nothing_like(t);
    };
    return {like(x, true), like(x, RESIDUAL), like(scale, modulation_grads && RESIDUAL),
            like(scale, modulation_grads), like(scale, modulation_grads)};
}

inline void check_same_modulation(const Tensor& gate, const Rows& gate_rows, const Tensor& scale,
                                  const Rows& scale_rows) {
    STD_TORCH_CHECK(gate.scalar_type() == scale.scalar_type() && gate_rows.tokens == scale_rows.tokens &&
                        gate_rows.batch == scale_rows.batch,
                    "gate: expected the shape and dtype of scale");
}

// Device::forward<RESIDUAL>(x, residual, scale, shift, eps) and
// Device::backward<KIND>(grad, x, other, scale, stats, modulation_grads), where x is what was normalised.
template <class Device>
struct AdalnOps {
    static std::tuple<Tensor, Tensor> modulate(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                               double eps) {
        // Without a residual the kernel reads nothing of it.
        AdalnResult r = Device::template forward<false>(x, {x, scale, 0.}, scale, shift, eps);
        return {r.out, r.stats};
    }

    static std::tuple<Tensor, Tensor, Tensor> modulate_backward(const Tensor& grad, const Tensor& x,
                                                                const Tensor& scale, const Tensor& stats,
                                                                bool modulation_grads) {
        const AdalnOther nothing{grad, x, scale, 0.};
        AdalnGradients d =
            Device::template backward<Adaln::single>(grad, x, nothing, scale, stats, modulation_grads);
        return {d.dx, d.dscale, d.dshift};
    }

    static std::tuple<Tensor, Tensor, Tensor> modulate_for_two_backward(const Tensor& grad,
                                                                        const Tensor& second, const Tensor& x,
                                                                        const Tensor& scale,
                                                                        const Tensor& stats,
                                                                        bool modulation_grads) {
        const AdalnOther other{second, x, scale, 0.};
        AdalnGradients d =
            Device::template backward<Adaln::forked>(grad, x, other, scale, stats, modulation_grads);
        return {d.dx, d.dscale, d.dshift};
    }

    static std::tuple<Tensor, Tensor, Tensor> gated_residual_modulate(const Tensor& x, const Tensor& y,
                                                                      const Tensor& gate, const Tensor& scale,
                                                                      const Tensor& shift, double eps,
                                                                      double clip) {
        AdalnResult r = Device::template forward<true>(x, {y, gate, clip}, scale, shift, eps);
        return {r.h, r.out, r.stats};
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_modulate_backward(
        const Tensor& grad_h, const Tensor& grad_out, const Tensor& h, const Tensor& y, const Tensor& gate,
        const Tensor& scale, const Tensor& stats, double clip, bool modulation_grads) {
        const AdalnOther other{grad_h, y, gate, clip};
        AdalnGradients d =
            Device::template backward<Adaln::residual>(grad_out, h, other, scale, stats, modulation_grads);
        return {d.dx, d.dy, d.dgate, d.dscale, d.dshift};
    }

    static void implement(torch::stable::detail::StableLibrary& m) {
        m.impl("modulate", TORCH_BOX(&modulate));
        m.impl("modulate_backward", TORCH_BOX(&modulate_backward));
        m.impl("modulate_for_two", TORCH_BOX(&modulate));
        m.impl("modulate_for_two_backward", TORCH_BOX(&modulate_for_two_backward));
        m.impl("gated_residual_modulate", TORCH_BOX(&gated_residual_modulate));
        m.impl("gated_residual_modulate_backward", TORCH_BOX(&gated_residual_modulate_backward));
    }
};

}  // namespace fastdistill
