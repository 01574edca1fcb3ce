"""A kernel as torch operators and as a differentiable function: written once for all kernels."""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .loader import call


def like(*tensors, dtype=None):
    """A contiguous buffer for each tensor; None: an empty one, as a kernel's operators return no None."""
    there = next(x for x in tensors if x is not None)
    contiguous = torch.contiguous_format
    return [there.new_empty(0, dtype=torch.float32) if x is None else torch.empty_like(x, dtype=dtype, memory_format=contiguous)
            for x in tensors]


def operator(name, f, schema, fake):
    """f as a torch operator inside compiled graphs, elsewhere f itself: torch takes longer to dispatch a Python
    operator than these kernels often take to run."""
    op = torch.library.custom_op(f"nanodir::{name}", f, mutates_args=(), schema=f"({schema}) -> Tensor[]")
    op.register_fake(fake)
    return lambda *args: op(*args) if torch.compiler.is_compiling() else f(*args)


def differentiable(compute, backward, materialize):
    """-> an autograd.Function of numbers, eps, *inputs.

    compute(inputs, numbers, eps) -> outputs, tensors to save; backward(saved, dout, numbers, eps) -> a gradient or
    None per input. materialize: the gradients `dout` of unused outputs are zeros, not None.
    """
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, numbers, eps, *inputs):
            out, saved = compute(inputs, numbers, eps)
            ctx.save_for_backward(*saved)
            ctx.numbers, ctx.eps = numbers, eps
            ctx.set_materialize_grads(materialize)
            return tuple(out)

        @staticmethod
        @once_differentiable
        def backward(ctx, *dout):
            return None, None, *backward(ctx.saved_tensors, dout, ctx.numbers, ctx.eps)

    return Function


def wants_grad(*args):
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


class Kernel:
    """A compiled kernel, forward and backward. A subclass says what is particular to it.

    The kernel takes integers, the last one whether it goes backward, and its buffers in this order: inputs, outputs,
    gradients of the outputs, gradients of the inputs. None or an empty tensor stands for one that there is not.
    """
    arity = 1               # inputs
    visible = None          # outputs that a caller gets, the first so many; None: all
    materialize = True      # gradients of unused outputs are zeros, not None

    def __init__(self, name):
        def forward(inputs, numbers, eps):
            out = self.outputs(inputs, numbers)
            call(name, (*self.size(inputs, numbers), False), (*inputs, *out), eps)
            return out

        def backward(inputs, out, dout, numbers, eps):
            grads = self.grads(inputs, numbers)
            call(name, (*self.size(inputs, numbers), True), (*inputs, *out, *dout, *grads), eps)
            return grads

        given = "Tensor?[] inputs"
        rest = "int[] numbers, float eps"
        self.forward = operator(name, forward, f"{given}, {rest}", lambda x, numbers, eps: self.outputs(x, numbers))
        self.backward = operator(name + "_backward", backward, f"{given}, Tensor?[] out, Tensor?[] dout, {rest}",
                                 lambda x, out, dout, numbers, eps: self.grads(x, numbers))
        self.function = differentiable(self.compute, self.differentiate, self.materialize)

    def __call__(self, *inputs, numbers=(), eps=0.0):
        """-> outputs; through the autograd.Function only where it must be, which takes as long as a small kernel."""
        if wants_grad(*inputs):
            return self.function.apply(numbers, eps, *inputs)
        return self.forward(inputs, numbers, eps)[:self.visible]

    def compute(self, inputs, numbers, eps=0.0):
        """-> outputs, what `differentiate` needs."""
        out = self.forward(inputs, numbers, eps)
        return out[:self.visible], self.keep(inputs, out)

    def differentiate(self, saved, dout, numbers, eps=0.0):
        """-> a gradient or None per input."""
        inputs, out = saved[:self.arity], saved[self.arity:]
        return self.spread(self.backward(inputs, out, dout, numbers, eps), inputs, numbers)

    def size(self, inputs, numbers):
        """The integers but for the last one."""
        return *inputs[0].shape, *numbers

    def outputs(self, inputs, numbers):
        """Buffers for the outputs."""
        return like(inputs[0])

    def keep(self, inputs, out):
        """Inputs and outputs with None in place of those that backward does not read."""
        return *inputs, *[None] * len(out)

    def grads(self, inputs, numbers):
        """Buffers for the gradients, as backward fills them."""
        return like(*inputs)

    def spread(self, grads, inputs, numbers):
        """A gradient or None per input."""
        return [None if x is None else d for d, x in zip(grads, inputs)]
