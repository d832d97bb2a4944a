// Scalar arithmetic of the class-logit losses, shared by the host and device kernels.
// A is the accumulate type: float, or double for float64 inputs. z_s student, z_t teacher, T temperature.
#pragma once

#include "config.h"

namespace frskd {

// What one pass over the classes of one row gathers. Exponentials are of differences to the running maxima, so two
// partial sums over different classes of the same row can be merged (online softmax).
template <typename A>
struct RowSums {
  A student_max;           // max_k z_s
  A teacher_max;           // max_k z_t
  A student_sum;           // sum_k exp(z_s - student_max)
  A student_sum_tempered;  // sum_k exp((z_s - student_max) / T)
  A teacher_sum;           // sum_k exp(z_t - teacher_max)
  A teacher_sum_tempered;  // sum_k exp((z_t - teacher_max) / T)
  A cross;  // sum_k exp((z_t - teacher_max) / T) * ((z_t - teacher_max) - (z_s - student_max)), 0 where exp is 0
};

// What the label distribution t needs of the row, from logits shifted by the row maximum: CE = log_sum * mass - dot.
template <typename A>
struct LabelSums {
  A mass;         // sum_k t_k: 1, or less where an ignored label is part of a mix
  A student_dot;  // sum_k t_k (z_s - student_max)
  A teacher_dot;  // sum_k t_k (z_t - teacher_max)
};

template <typename A>
FRSKD_HOST_DEVICE A cross_entropy(
    A log_sum,  // log sum_k exp(z - max)
    A mass,
    A dot) {
  // A masked class may put dot at -inf; an absent label must stay exactly 0.
  return mass == A(0) ? A(0) : log_sum * mass - dot;
}

// T^2 * sum_k p_t (log p_t - log p_s) from the row's sums over shifted logits.
template <typename A>
FRSKD_HOST_DEVICE A tempered_divergence(
    A cross, A teacher_sum_tempered, A student_log_sum_tempered, A teacher_log_sum_tempered, A temperature) {
  return temperature * temperature *
         (cross / (teacher_sum_tempered * temperature) - (teacher_log_sum_tempered - student_log_sum_tempered));
}

// d loss / d z_s for one class.
template <typename A>
FRSKD_HOST_DEVICE A student_gradient(
    A probability,       // softmax(z_s)_k
    A tempered,          // softmax(z_s / T)_k
    A teacher_tempered,  // softmax(z_t / T)_k
    A label,             // t_k
    A mass,              // sum_k t_k
    A grad_ce,
    A grad_kd_times_temperature) {
  return grad_ce * (probability * mass - label) + grad_kd_times_temperature * (tempered - teacher_tempered);
}

// d loss / d z_t for one class; the second term only where the divergence is not detached from the teacher.
template <typename A>
FRSKD_HOST_DEVICE A teacher_gradient(
    A probability,       // softmax(z_t)_k
    A teacher_tempered,  // softmax(z_t / T)_k
    A log_ratio,         // log p_t - log p_s at temperature T
    A divergence,        // KD / T^2 of the row
    A label,
    A mass,
    A grad_ce,
    A grad_kd_times_temperature  // 0 when detached
) {
  const A kd =
      teacher_tempered == A(0) ? A(0) : grad_kd_times_temperature * teacher_tempered * (log_ratio - divergence);
  return grad_ce * (probability * mass - label) + kd;
}

}  // namespace frskd
