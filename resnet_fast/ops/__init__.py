"""What is computed: each op's signature, checks, fake, derivative; and the mathematics."""

from .contract import add_act, bn_act, conv_bn_act, fuses_bn_act

__all__ = ["add_act", "bn_act", "conv_bn_act", "fuses_bn_act"]
