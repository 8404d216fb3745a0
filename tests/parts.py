"""A loss against a memory that is cut into parts, put together again as the ranks of a group would."""

import torch


def loss_of_parts(module, z, labels, parts, loss, anchors=None, **options):
    """Loss, derivative by z and pairs, of `module.memory_sums` and `module.settle_sums`.

    parts: of each its bank, its labels and options of its own.
    """
    bounds = [0]
    for bank, *_ in parts:
        bounds.append(bounds[-1] + len(bank))
    sums = torch.zeros(len(parts), 2, len(z), 4, dtype=torch.float64, device=z.device)
    grads = torch.zeros(len(parts), 2, *z.shape, dtype=z.dtype, device=z.device)
    given = None
    for number, slots in enumerate(loss.passes):
        for k, (bank, bank_labels, its) in enumerate(parts):
            of_part, grads_of_part = module.memory_sums(
                z, labels, bank, bank_labels, loss, number=number, given=given, first=bounds[k], anchors=anchors,
                **its, **options,
            )  # fmt: skip
            for slot in slots:
                sums[k, slot], grads[k, slot] = of_part[slot], grads_of_part[slot]
        given, scale, totals = module.settle_sums(sums, loss, number + 1, anchors)
    value, count, (anchors_in_all, positives, negatives) = totals[:2], totals[2:4], totals[4:]
    average = 1 / count.clamp(min=1)
    of_slot = average[: loss.groups].expand(2)
    factor = (scale * of_slot[:, None]).to(z.dtype)[..., None]
    grad = torch.where(factor == 0, 0, factor * grads).sum((0, 1))
    grad = torch.where(z.isfinite().all(1, keepdim=True), grad, torch.nan)
    pairs = torch.stack([positives, negatives]) / anchors_in_all.clamp(min=1)
    return (average * value).sum().to(z.dtype), grad, pairs
