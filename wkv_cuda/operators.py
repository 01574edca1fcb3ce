"""A kernel as torch operators and as a differentiable function: written once for all kernels."""
import torch
from torch.autograd.function import once_differentiable

from .loader import call

def like(*tensors, dtype=None):
    """A contiguous buffer per tensor, an empty one per None: a torch operator does not return None."""
    device = next(x.device for x in tensors if x is not None)
    dense = torch.contiguous_format
    none = lambda: torch.empty(0, dtype=torch.float32, device=device)
    return [none() if x is None else torch.empty_like(x, dtype=dtype, memory_format=dense) for x in tensors]

def kind_of(x):
    """What the kernels' arithmetic is in: float32, and plain torch's float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

def expect(op, letters, shape, **tensors):
    """ValueError for a tensor of another shape: the kernels trust every shape."""
    for name, x in tensors.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {letters} = {tuple(shape)}")

def wants_grad(*tensors):
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

def operator(name, f, arguments, fake):
    """f as a torch operator in compiled graphs, elsewhere f itself: to dispatch a Python operator takes
    longer than these kernels often take to run."""
    op = torch.library.custom_op(f"nanodir::{name}", f, mutates_args=(), schema=f"({arguments}) -> Tensor[]")
    op.register_fake(fake)
    return lambda *args: op(*args) if torch.compiler.is_compiling() else f(*args)

class Kernel:
    """A compiled kernel, forward and backward; a subclass says what is particular to it.

    The kernel takes integers, the last one whether it goes backward, and its buffers in this order: inputs,
    outputs, gradients of the outputs, gradients of the inputs. None or an empty one: there is none.
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

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, numbers, eps, *inputs):
                out, saved = self.compute(inputs, numbers, eps)
                ctx.save_for_backward(*saved)
                ctx.options = numbers, eps
                ctx.set_materialize_grads(self.materialize)
                return tuple(out)

            @staticmethod
            @once_differentiable
            def backward(ctx, *dout):
                grads = self.differentiate(ctx.saved_tensors, dout, *ctx.options)
                wanted = ctx.needs_input_grad[2:]
                return None, None, *(d if want else None for d, want in zip(grads, wanted))

        self.forward = operator(name, forward, "Tensor?[] inputs, int[] numbers, float eps",
                                lambda inputs, numbers, eps: self.outputs(inputs, numbers))
        self.backward = operator(f"{name}_backward", backward,
                                 "Tensor?[] inputs, Tensor?[] out, Tensor?[] dout, int[] numbers, float eps",
                                 lambda inputs, out, dout, numbers, eps: self.grads(inputs, numbers))
        self.apply = Function.apply

    def __call__(self, *inputs, numbers=(), eps=0.0):
        """-> outputs; through the autograd.Function, which takes as long as a small kernel, only where it
        must be."""
        if wants_grad(*inputs):
            return self.apply(numbers, eps, *inputs)
        return self.forward(inputs, numbers, eps)[:self.visible]

    def compute(self, inputs, numbers, eps=0.0):
        """-> outputs, what `differentiate` needs."""
        out = self.forward(inputs, numbers, eps)
        return out[:self.visible], self.keep(inputs, out)

    def differentiate(self, saved, dout, numbers, eps=0.0):
        """-> a gradient per input; where there is no such input, anything."""
        return self.backward(saved[:self.arity], saved[self.arity:], dout, numbers, eps)

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
