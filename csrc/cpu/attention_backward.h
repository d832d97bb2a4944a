// Attention transfer, backward: gradient = coefficient * sign(f) * |f|^(p - 1).
#pragma once

#include "attention_call.h"
#include "attention_features.h"

namespace frskd {
namespace {

// Where channels are split, several steps for each thread even out what they cost.
constexpr int64 kStepsPerThread = 4;

template <typename T>
inline bool aligned_for_streaming(const T* pointer, int64 count, int64 width) {
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(width) * sizeof(T);
  return count % width == 0 && reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// gradient = weight * sign(f) |f|^(p-1) for one block, by ordinary or cache-bypassing stores.
template <bool Square, bool PastCache, typename V, typename T>
inline __attribute__((always_inline)) void scale_block(const V* weight, const T* source, T* target, double exponent) {
  using B = Block<T>;
  V values[B::kVectors];
  B::read(source, values);
  for (int v = 0; v < B::kVectors; ++v) values[v] = weight[v] * derivative<Square>(values[v], exponent);
  if constexpr (PastCache) {
    B::write_past_cache(values, target);
  } else {
    B::write(values, target);
  }
}

// The same for the channels [begin, end) of one sample.
template <bool Square, typename T, typename A>
void scale_sample(
    const Map& feature,
    const Map& gradient,
    int64 sample,
    int64 begin,
    int64 end,
    double exponent,
    A grad,
    const A* coefficients,  // (pixels,)
    A* weights,             // (pixels,), scratch
    bool streaming) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  using B = Block<T>;
  constexpr int64 width = L::kWidth;
  const int64 pixels = pixels_of(feature);
  const T* in = static_cast<const T*>(feature.data) + sample * feature.stride_n;
  T* out = static_cast<T*>(gradient.data) + sample * gradient.stride_n;
  for (int64 pixel = 0; pixel < pixels; pixel += width) {
    store_up_to(quiet(load_up_to(coefficients + pixel, pixels - pixel) * grad), weights + pixel, pixels - pixel);
  }
  if (pixels_are_contiguous(feature) && pixels_are_contiguous(gradient)) {
    const int64 whole = pixels - pixels % B::kElements;
    B::deal(weights, whole);
    for (int64 channel = begin; channel < end; ++channel) {
      const T* source = in + channel * feature.stride_c;
      T* target = out + channel * gradient.stride_c;
      const auto run = [&](auto past_cache) __attribute__((always_inline)) {
        for (int64 pixel = 0; pixel < whole; pixel += B::kElements) {
          V weight[B::kVectors];
          for (int v = 0; v < B::kVectors; ++v) weight[v] = load(weights + pixel + v * width);
          scale_block<Square, decltype(past_cache)::kValue != 0>(weight, source + pixel, target + pixel, exponent);
        }
      };
      if (streaming && aligned_for_streaming(target, pixels, B::kElements)) {
        run(Constant<1>{});
        continue;
      }
      run(Constant<0>{});
      for (int64 pixel = whole; pixel < pixels; pixel += width) {
        const int64 rest = pixels - pixel < width ? pixels - pixel : width;
        const V value =
            load_first(weights + pixel, rest) * derivative<Square>(load_first(source + pixel, rest), exponent);
        store_first(value, target + pixel, rest);
      }
    }
    return;
  }
  const int64 channels = end - begin;
  const bool channels_contiguous = feature.stride_c == 1 && gradient.stride_c == 1;
  for (int64 pixel = 0; pixel < pixels; ++pixel) {
    const T* source = in + begin * feature.stride_c + offset_of(feature, pixel);
    T* target = out + begin * gradient.stride_c + offset_of(gradient, pixel);
    const V weight = L::splat(weights[pixel]);
    if (!channels_contiguous) {
      for (int64 first = 0; first < channels; first += width) {
        const int64 count = channels - first < width ? channels - first : width;
        V gathered = {};
        for (int64 lane = 0; lane < count; ++lane) {
          gathered[lane] = to_scalar(source[(first + lane) * feature.stride_c]);
        }
        const V value = weight * derivative<Square>(gathered, exponent);
        for (int64 lane = 0; lane < count; ++lane) {
          from_scalar(value[lane], target + (first + lane) * gradient.stride_c);
        }
      }
      continue;
    }
    const V weights_of_block[2] = {weight, weight};
    if (streaming && aligned_for_streaming(target, channels, B::kElements)) {
      for (int64 channel = 0; channel < channels; channel += B::kElements) {
        scale_block<Square, true>(weights_of_block, source + channel, target + channel, exponent);
      }
      continue;
    }
    int64 channel = 0;
    for (; channel + B::kElements <= channels; channel += B::kElements) {
      scale_block<Square, false>(weights_of_block, source + channel, target + channel, exponent);
    }
    for (; channel < channels; channel += width) {
      const int64 rest = channels - channel < width ? channels - channel : width;
      store_first(weight * derivative<Square>(load_first(source + channel, rest), exponent), target + channel, rest);
    }
  }
}

template <typename T, typename A>
void attention_backward_typed(const AttentionBackwardCall& call, ParallelFor run, int threads) {
  const int64 largest = largest_map(call.features, call.levels);
  // Few samples: split the channels as well.
  const int64 splits =
      call.batch >= threads || call.batch == 0 ? 1 : (threads + call.batch - 1) / call.batch * kStepsPerThread;
  const int64 work = sample_elements(call.features, call.levels) / splits;
  parallel(run, call.batch * splits, grain_for(work), [&](int64 begin, int64 end) {
    Scratch<A> weights(largest);
    for (int64 step = begin; step < end; ++step) {
      const int64 sample = step / splits, split = step % splits;
      int64 offset = 0;
      for (int64 level = 0; level < call.levels; ++level) {
        const Map& feature = call.features[level];
        const Map& gradient = call.gradients[level];
        const int64 pixels = pixels_of(feature);
        const A upstream =
            static_cast<const A*>(call.grad)[level * call.grad_stride_level + sample * call.grad_stride_sample];
        const A grad = upstream * static_cast<A>(call.scale);
        const A* coefficients = static_cast<const A*>(call.coefficients) + call.batch * offset + sample * pixels;
        const int64 first = feature.channels * split / splits, last = feature.channels * (split + 1) / splits;
        const auto apply = [&](auto kernel) {
          kernel(feature, gradient, sample, first, last, call.exponent, grad, coefficients, weights.data, call.stream);
        };
        call.exponent == 2.0 ? apply(scale_sample<true, T, A>) : apply(scale_sample<false, T, A>);
        offset += pixels;
      }
    }
    if (call.stream) finish_streaming();
  });
}

void attention_backward(const AttentionBackwardCall& call, Element element, ParallelFor run, int threads) {
  with_element(element, [&](auto type, auto number) {
    attention_backward_typed<decltype(type), decltype(number)>(call, run, threads);
  });
}

}  // namespace
}  // namespace frskd
