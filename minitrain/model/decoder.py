"""The text decoder of a model, and its blocks."""

from torch import nn

from minitrain.errors import ConfigError


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the module that maps token ids to the last hidden states, without image or audio encoders."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder()  # the output layer in ModernBERT, the model itself in Llama 4
    for module in (decoder, model.base_model, *decoder.children()):
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is None:
            return module
    return model.base_model


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks: the longest ModuleList of the decoder that is not inside another one.

    Lists of single layers, such as embeddings, and those of image encoders do not count.
    """
    from transformers import PreTrainedModel

    decoder = decoder_of(model)
    encoders = [m for m in decoder.modules() if isinstance(m, PreTrainedModel) and m.main_input_name != "input_ids"]
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    inner = {id(sub) for outer in (*lists, *encoders) for sub in outer.modules() if sub is not outer}
    outermost = [module for module in lists if id(module) not in inner and any(module[0].children())]
    if not outermost:
        raise ConfigError(
            f"{type(model).__name__} is not supported: it has no ModuleList of transformer blocks.", "unsupported-model"
        )
    return max(outermost, key=len)
