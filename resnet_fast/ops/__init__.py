"""What is computed: each op's signature, checks, fake, derivative; and the mathematics."""

from .conv import check_convolution, conv_bn_act
from .norm import bn_act, fuses_bn_act
from .residual import add_act

__all__ = ["add_act", "bn_act", "check_convolution", "conv_bn_act", "fuses_bn_act"]
