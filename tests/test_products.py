"""The layouts for bfloat16 change where numbers lie and nothing else; who computes fp32 products on the CPU."""

import pytest
import torch
from torch.nn import functional

import device
import products


@pytest.mark.parametrize("shape", [(3, 32), (5, 33), (1, 1), (4, 1150), (products.BAND + 1, 7)])
@pytest.mark.parametrize("function", ["aligned", "transposed"])
def test_rows_of_copies_begin_cache_lines_and_nothing_but_zeros_lies_between(shape, function, monkeypatch):
    matrix, new_empty = torch.randn(shape).to(torch.bfloat16), torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    copy = products.transposed(matrix) if function == "transposed" else products.aligned(matrix.float(), torch.bfloat16)
    assert torch.equal(copy, matrix.t() if function == "transposed" else matrix)
    rows, width = copy.shape
    assert copy.stride(1) == 1
    assert all(row.data_ptr() % 64 == 0 for row in copy)
    assert not copy.as_strided((rows, copy.stride(0) - width), copy.stride(), width).any()


def test_only_under_autocast_are_tensors_brought_into_another_layout():
    matrix = torch.randn(4, 33)
    assert products.for_products(matrix)[0] is matrix
    with torch.autocast("cpu", torch.bfloat16):
        copy, term = products.for_products(matrix, matrix[0])
    assert copy.dtype == term.dtype == torch.bfloat16
    assert copy.stride() == (64, 1)


def test_the_gradients_of_linear_are_those_of_finite_differences():
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((4, 2, 5), (6, 5), (6,))]
    assert torch.autograd.gradcheck(products.Linear.apply, inputs)


def test_linear_in_bfloat16_is_that_of_pytorch_to_the_precision_of_bfloat16():
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in ((70, 3, 33), (300, 33), (300,))]
    results = []
    for function, dtype in ((products.linear, torch.float32), (functional.linear, torch.float64)):
        variables = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=function is products.linear):
            output = function(*variables)
        assert (type(output.grad_fn).__name__ == "LinearBackward") == (function is products.linear)
        results.append((output, *torch.autograd.grad(output, variables, output.detach().cos())))
    assert [x.dtype for x in results[0]] == [torch.bfloat16, *[torch.float32] * 3]
    for found, exact in zip(*results):
        assert 1e-4 * exact.norm() < (found - exact).norm() < 0.02 * exact.norm()


def test_linear_is_that_of_pytorch_where_nothing_trains_in_bfloat16():
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((7, 3, 33), (6, 33), (6,))]
    assert torch.equal(products.linear(*inputs), functional.linear(*inputs))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(products.linear(*inputs), functional.linear(*inputs))


@pytest.mark.parametrize("dtype, precision", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-15)])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_packed_product_is_the_product(dtype, precision, rows):
    torch.manual_seed(0)
    x, weight, term = (torch.randn(shape).to(dtype) for shape in ((rows, 33), (300, 33), (rows, 300)))
    product = products.Packed(weight, rows)
    assert (product.mkl is not None) == (dtype == torch.float32 and products.packs_fp32())
    assert (product.onednn is not None) == (dtype == torch.bfloat16 and products.packs_bf16())
    expected = x.double() @ weight.double().t()
    for found, exact in ((product(x), expected), (product.plus(term, x), expected + term)):
        assert found.dtype == dtype
        assert (found - exact).norm() < precision * exact.norm()


def test_fp32_is_packed_on_processors_of_intel(monkeypatch):
    for name, packs in (("GenuineIntel", True), ("AuthenticAMD", False), ("", False)):
        monkeypatch.setattr(products, "cpuinfo", lambda name=name: name)
        assert products.packs_fp32() == (packs and torch.backends.mkl.is_available()
                                         and torch.backends.mkldnn.is_available())


def test_a_packed_linear_map_multiplies_in_bfloat16():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 33), torch.randn(300, 33), torch.randn(300)
    expected = functional.linear(x.bfloat16().double(), weight.bfloat16().double()) + bias
    output = products.PackedLinear(weight, bias)(x)
    assert output.dtype == torch.float32
    assert 1e-4 * expected.norm() < (output - expected).norm() < 3e-3 * expected.norm()  # rounded once, before the bias


def test_onednn_computes_products_only_where_they_are_exact(monkeypatch):
    settings = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", settings.append)
    monkeypatch.setattr(device, "cpuinfo", lambda: "GenuineIntel")
    device.use_onednn()
    assert settings == []
    monkeypatch.setattr(device, "cpuinfo", lambda: "AuthenticAMD")
    monkeypatch.setattr(device, "medium_is_exact", device.medium_is_exact.__wrapped__)
    device.use_onednn()
    assert settings[-1] == "medium"
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a.bfloat16(), b.bfloat16()).float()
                        if a.dtype == torch.float32 else product(a, b))
    device.use_onednn()
    assert settings[-1] == "highest"
