"""The check of a wheel, applied to what is installed here: it knows every op and the state of a memory."""

from tools.wheel_check import inside


def test_every_op_has_a_check():
    inside.check_ops("cpu")


def test_training_is_compared_with_the_reference():
    inside.check_training("cpu")
