"""A CLIP of the real classes that is made in a moment, for all who read one from a folder."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path, longest: int = 12) -> Path:
    """Reads pictures of 32 x 32 pixels and texts of `longest` tokens, which are letters."""
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 29, "max_position_embeddings": longest, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 8}, projection_dim=12)
    model = CLIPModel(config)
    for parameter in model.parameters():  # fresh ones are so small that every picture looks alike
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Of single letters, between a start and an end."""
    words = {word: place for place, word in enumerate(["<s>", "</s>", "<pad>", *string.ascii_lowercase])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
