"""`xbn_ext.plain` as `torch.ops.xbn_plain`: what `torch.ops.xbn_ext` is where there is no compiled library."""

from xbn_ext import _library, plain

NAMESPACE = "xbn_plain"
kept = _library.register(NAMESPACE, plain)
