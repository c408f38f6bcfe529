"""Run the checks of a loaded policy on one from the meta device, with random values that need almost no memory."""

import torch
from torch import Tensor, nn

from .diagnostics import first_line
from .document_check import check_documents
from .few_blocks import with_few_blocks
from .load_check import check_encoder, check_output_layer
from .policy import Policy
from .sequence_head import is_encoder

SPREAD = 0.05  # standard deviation of the values: gradients are not 0, and nothing overflows
N_VALUES = 1 << 20  # distinct values, which are repeated
MAX_VOCABULARY = 1024  # rows of the LM head; the checks use the first few tokens


def check_meta_policy(policy: Policy, packing: bool) -> list[str]:
    """Run the checks that training runs on a loaded policy. The policy cannot be used afterwards.

    Returns:
        Warnings: the comparison of the output layer with random values can be a false alarm.

    Raises:
        ConfigError: The output depends on the batch of a document. This is certain with any values.
    """
    _fill_values(policy)
    policy.eval()
    warnings = []
    try:
        if is_encoder(policy.model):
            check_encoder(policy)
        else:
            with_few_blocks(policy, lambda: check_output_layer(policy))
    except Exception as error:  # with random values a model can raise any error
        warnings.append(f"a check with random values failed: {first_line(error)}")
    if not is_encoder(policy.model):
        check_documents(policy, packing)
    return warnings


def _fill_values(policy: Policy) -> None:
    values = SPREAD * torch.randn(N_VALUES, generator=torch.Generator().manual_seed(0))
    head = policy.model.get_output_embeddings()
    vocabulary = () if hasattr(head, "lora") else (head, policy.model.get_input_embeddings())
    replaced: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            shape = list(parameter.shape)
            if module in vocabulary:
                shape[0] = min(shape[0], MAX_VOCABULARY)
            if id(parameter) not in replaced:
                replaced[id(parameter)] = nn.Parameter(_view(values, shape), requires_grad=False)
            module._parameters[name] = replaced[id(parameter)]


def _view(values: Tensor, shape: list[int]) -> Tensor:
    """Return a view of few values: adjacent rows are shifted by one value, and stacked matrices are identical."""
    pitch = shape[-1] if len(shape) > 2 else 1  # products of stacked matrices do not accept overlapping rows
    strides = [0] * (len(shape) - 2) + [pitch, 1][2 - min(2, len(shape)) :]
    n = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    values = values if n <= len(values) else values.repeat(-(-n // len(values)))
    return values.as_strided(shape, strides)
