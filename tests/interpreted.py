"""Triton's interpreter made to round as a device does; conftest.py calls it when TRITON_INTERPRET=1 is set."""

import torch
import triton.language as tl
from triton.runtime import interpreter


def round_as_a_device() -> None:
    """NumPy multiplies and adds in two steps, a device rounds once; the interpreter cuts bfloat16 off, a device rounds.

    And where Triton 3.6 takes an array of one element for an integer, NumPy 2.5 and later must let it.
    """

    def fused(self, x, y, z):
        wide = x.data.astype("f8") * y.data.astype("f8") + z.data.astype("f8")
        return interpreter.TensorHandle(wide.astype(x.data.dtype), z.dtype.scalar)

    plain = interpreter._convert_float

    def convert(input, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            return torch.from_numpy(input.copy()).bfloat16().view(torch.uint16).numpy()
        return plain(input, input_dtype, output_dtype, rounding_mode)

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_fma = fused
    interpreter._convert_float = convert
