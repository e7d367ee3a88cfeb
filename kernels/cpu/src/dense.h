// Dense layers on packed weights (kernels/cpu/dense.py), by the same engines as the experts.

template <typename Engine, typename Weights>
void dense_rows(const DenseArgs& args, const Weights& weights, const typename Engine::Activation* x) {
  const long groups = (args.num_outputs + kRows - 1) / kRows, pairs = (groups + 1) / 2;
  uint16_t* out = static_cast<uint16_t*>(args.out);
  auto body = [&](long begin, long end) {
    Engine engine;
    project(engine, weights, 2 * begin, 2 * end < groups ? 2 * end : groups, x, args.num_rows,
            [&](long group, int num_groups, long from, long count, const Outputs* y) {
              const long first = group * kRows, left = args.num_outputs - first;
              const long outputs = left < num_groups * kRows ? left : num_groups * kRows;
              alignas(64) float scale[2 * kRows], bias[2 * kRows] = {}, values[2 * kRows];
              for (long i = 0; i < 2 * kRows; ++i) scale[i] = args.scales == nullptr || i >= outputs ? 1.0f : args.scales[first + i];
              if (args.bias != nullptr) widen_values(args.bias, kBfloat16, first, outputs, bias);
              for (long t = 0; t < count; ++t) {
                for (int i = 0; i < num_groups * kRows; i += kLanes) store(values + i, load(y[t] + i) * load(scale + i) + load(bias + i));
                store_values(out + (from + t) * args.num_outputs + first, values, outputs);
              }
            });
  };
  parallel_for(pairs, at_least(pairs / (16 * num_threads()), 1), body);
}

template <typename Engine>
void run_dense(const DenseArgs& args, const typename Engine::Activation* x) {
  if (args.scales == nullptr) {
    dense_rows<Engine>(args, Bf16Weights(args.weight, args.width), x);
  } else {
    dense_rows<Engine>(args, Int8Weights(args.weight, args.width), x);
  }
}
