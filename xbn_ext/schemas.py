"""Every op of xbn_ext. Letters: B batch rows, A anchors of them, M bank rows (capacity), D dimension.

  normalize    x [B, D] -> z [B, D], its rows divided by max(norm, eps), and their norms [B]; normalize_backward gives
               dLoss/dx from dLoss/dz
  moments      x [B, D] -> mean [D], std [D], rows []              of the rows in the mask and finite
  track_       measure x, filter, and compose the map that moves the bank to the filtered moments; stats [3]: how far
               its moments are from the batch's before and after, and the filter's gain; innovation [D]: of the mean,
               from which the process noise is estimated where it is not given
  transform_   write the pending map into the bank; scale, shift become 1, 0
  standardize_ rewrite the bank in standardised coordinates, if it has left them; the pending map compensates
  enqueue_     rows of z, their labels, ids and the step enter the ring -> slots [B], -1 where a row was not stored
  memory_loss  z against the bank -> loss [], dLoss/dz [B, D] ([0, D] unless need_grad), pairs [2] per anchor
  transform_memory_loss_   the two in turn or, where that is free of races, in one sweep
  memory_sums  one pass of memory_loss against a bank that is a part of a longer one -> sums [2, B, 4], and what they
               weigh, [2, B, D] ([2, 0, D] unless need_grad)
  settle_sums  the sums of n parts [n, 2, B, 4] -> what each anchor is given for the next pass, [B]; or, after the last,
               what each part's gradient is multiplied by, [n, 2, B], and the sums over the anchors, [7]
  batch_loss   z against the other rows of its batch, from dots [B, B] = z z^T -> loss [], dLoss/ddots [B, B]
               ([0, B] unless need_grad)
  batch_sums   some rows of a batch against all of it, from dots [A, B] -> what these A anchors add to the sums of the
               loss, [7], and the derivative by dots, [A, B] ([0, B] unless need_grad), up to the averages
  step_        a training step of the memory, from normalize to enqueue_, with both losses -> loss [], dLoss/dx [B, D]
               ([0, D] unless need_grad), or by `sides` [2 B, D] if these are given: anchors and rows that differ by a
               temperature

A bank row u stands for scale * u + shift. Statistics are float64, counters int64 scalars, all on the device of the
bank. `ops/` documents the arguments, `reference/` says what they compute. The kernels register for these in
`csrc/glue/`; `plain/` has the functions for devices without kernels and, without the compiled library, for all.
"""

SCHEMAS = (
    "normalize(Tensor x, float eps) -> (Tensor z, Tensor norm)",
    "normalize_backward(Tensor grad_z, Tensor z, Tensor norm, float eps) -> Tensor grad_x",
    "moments(Tensor x, Tensor? mask=None) -> (Tensor mean, Tensor std, Tensor rows)",
    "track_(Tensor(a!) target_mean, Tensor(b!) target_std, Tensor(c!) variance, Tensor(d!) scale, "
    "Tensor(e!) shift, Tensor x, Tensor? mask, Tensor sums, Tensor count, float? process_noise, "
    "float measurement_noise, float? fixed_gain, float eps, Tensor(f!)? stats=None, Tensor(g!)? innovation=None) -> ()",
    "transform_(Tensor(a!) bank, Tensor(b!) sums, Tensor(c!) scale, Tensor(d!) shift, Tensor count) -> ()",
    "standardize_(Tensor(a!) bank, Tensor(b!) sums, Tensor(c!) scale, Tensor(d!) shift, Tensor count, "
    "float eps, Tensor? ring_sums=None, Tensor? ring_count=None) -> ()",
    "enqueue_(Tensor(a!) bank, Tensor(b!) bank_labels, Tensor(c!) sums, Tensor(d!) head, Tensor(e!) count, "
    "Tensor z, Tensor labels, Tensor? mask, Tensor scale, Tensor shift, Tensor(f!)? bank_ids=None, Tensor? ids=None, "
    "Tensor(g!)? bank_steps=None, Tensor? step=None, int first=0, int? ring_size=None) -> Tensor slots",
    "memory_loss(Tensor z, Tensor labels, Tensor bank, Tensor bank_labels, Tensor? count, Tensor? scale, "
    "Tensor? shift, Tensor? bank_ids, Tensor? exclude, Tensor? anchors, str loss, float[] parameters, "
    "bool renormalize, float eps, bool need_grad) -> (Tensor loss, Tensor grad_z, Tensor pairs)",
    "transform_memory_loss_(Tensor(a!) bank, Tensor(b!) sums, Tensor(c!) scale, Tensor(d!) shift, Tensor count, "
    "Tensor z, Tensor labels, Tensor bank_labels, Tensor? ranked, Tensor? bank_ids, Tensor? exclude, "
    "Tensor? anchors, str loss, float[] parameters, bool renormalize, float eps, bool need_grad) -> "
    "(Tensor loss, Tensor grad_z, Tensor pairs)",
    "memory_sums(Tensor z, Tensor labels, Tensor bank, Tensor bank_labels, Tensor? count, Tensor? scale, "
    "Tensor? shift, Tensor? bank_ids, Tensor? exclude, Tensor? anchors, Tensor? given, str loss, float[] parameters, "
    "int number, int first, bool renormalize, float eps, bool need_grad) -> (Tensor sums, Tensor grads)",
    "settle_sums(Tensor parts, Tensor? anchors, str loss, float[] parameters, int passes) -> "
    "(Tensor given, Tensor scale, Tensor totals)",
    "batch_loss(Tensor dots, Tensor labels, Tensor? ids, Tensor? anchors, str loss, float[] parameters, "
    "bool renormalize, float eps, bool need_grad) -> (Tensor loss, Tensor grad_dots)",
    "batch_sums(Tensor dots, Tensor labels, Tensor? ids, Tensor? anchors, str loss, float[] parameters, int first, "
    "bool need_grad) -> (Tensor totals, Tensor grad_dots)",
    "step_(Tensor(a!) bank, Tensor(b!) bank_labels, Tensor(c!) bank_ids, Tensor(d!) bank_steps, Tensor(e!) sums, "
    "Tensor(f!) head, Tensor(g!) count, Tensor(h!) scale, Tensor(i!) shift, Tensor(j!) target_mean, "
    "Tensor(k!) target_std, Tensor(l!) variance, Tensor(m!) innovation, Tensor(n!) step, Tensor(o!)? pairs, "
    "Tensor(p!)? drift_stats, "
    "Tensor x, Tensor? sides, Tensor labels, Tensor? mask, Tensor? ids, str loss, float[] parameters, bool follows, "
    "float? process_noise, float measurement_noise, float? fixed_gain, bool deferred, bool stores_first, "
    "bool normalizes, bool renormalize, float batch_weight, float memory_weight, bool center_gradient, "
    "int warmup_steps, float eps, bool need_grad) -> (Tensor loss, Tensor grad)",
    "cpu_isa() -> str",
    "cuda_architectures() -> str",  # that the build has kernels for; "" without nvcc
    "set_loss_way(str name) -> str",  # of `options.WAYS_FOR_TESTS`; returns the previous one
    # For the benchmark's roofline. Multiply-adds in the CPU's vector registers: how many operations, and their mean, 1.
    "_peak_fma(int threads, int rounds, bool float64) -> (float flops, float result)",
)  # fmt: skip
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
