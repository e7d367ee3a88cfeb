// The operations in fp32.

void experts(const ExpertsArgs& args) { run_experts<Fp32>(args); }

void dense(const DenseArgs& args) {
  auto widen_rows = [&](long begin, long end) {
    widen_values(args.x, kBfloat16, begin * args.width, (end - begin) * args.width, args.wide + begin * args.width);
  };
  parallel_for(args.num_rows, 16, widen_rows);
  run_dense<Fp32>(args, args.wide);
}
