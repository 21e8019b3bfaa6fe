"""Generation speed in tokens a second, compared with Hugging Face `generate`.

ours, beams              source computed once a sample, two slots a hypothesis and step, keys and values never reordered
ours, greedy             the same with one hypothesis
Hugging Face, decoder    `GPT2LMHeadModel` with the same layers, widths, vocabulary, beams and lengths
Hugging Face, encoder-decoder    `BartForConditionalGeneration` with half the layers each: about as many parameters

All generate exactly `target` tokens for each source; none may end earlier. `vs_hf_generate` is our speed over that of
the decoder, the network most similar to ours; `vs_hf_encoder_decoder` over that of the encoder-decoder.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from harness import Report, device, interleaved, ratio

from pmlm_dist.config import ModelConfig
from pmlm_dist.decoding.batch_generation import build_search, generate_batch
from pmlm_dist.decoding.settings import DecodingConfig
from pmlm_dist.engine.malloc import keep_freed_memory
from pmlm_dist.masking.blockwise import SpecialIds
from pmlm_dist.model.transformer import build_model
from pmlm_dist.parallel import groups

OURS, GREEDY = "ours, beams", "ours, greedy"
PEERS = {"vs_hf_generate": "Hugging Face, decoder", "vs_hf_encoder_decoder": "Hugging Face, encoder-decoder"}
HF_GREEDY = "Hugging Face, decoder, greedy"


@dataclass(frozen=True)
class GenerateOptions:
    """Model and lengths of the generation."""

    layers: int = 6
    """Layers of our model."""
    hidden: int = 512
    """Hidden size; heads have size 64."""
    batch: int = 4
    """Sources of a batch."""
    source: int = 512
    """Tokens of a source."""
    target: int = 32
    """Tokens of an answer."""
    beams: int = 5
    """Beams of a source."""
    vocabulary: int = 30_528
    """Size of the vocabulary."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of weights and activations."""
    threads: int = 2
    """Torch threads."""
    repeats: int = 5
    """Measured rounds."""

    def quick(self) -> GenerateOptions:
        """A smoke run."""
        small = dataclasses.replace(self, layers=2, hidden=64, batch=2, source=32, target=4)
        return dataclasses.replace(small, beams=2, vocabulary=1000, repeats=1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def run(options: GenerateOptions) -> Report:
    """Time all rows in interleaved rounds."""
    torch.set_num_threads(options.threads)
    groups.init_process_groups()
    if device().type == "cpu":
        keep_freed_memory()
    prepared = {
        OURS: _ours(options, method="beam"),
        PEERS["vs_hf_generate"]: _decoder(options, beams=options.beams),
        PEERS["vs_hf_encoder_decoder"]: _encoder_decoder(options),
        GREEDY: _ours(options, method="greedy"),
        HF_GREEDY: _decoder(options, beams=1),
    }
    seconds = interleaved({name: step for name, (step, _) in prepared.items()}, repeats=options.repeats)
    tokens = options.batch * options.target
    rows = {
        name: {
            "tokens/s": tokens / statistics.median(times),
            "ms a step": 1e3 * statistics.median(times) / options.target,
            "million parameters": prepared[name][1] / 1e6,
        }
        for name, times in seconds.items()
    }
    figures = {figure: ratio(seconds, peer, OURS) for figure, peer in PEERS.items()}
    figures["vs_hf_greedy"] = ratio(seconds, HF_GREEDY, GREEDY)
    return Report("generate", dataclasses.asdict(options), rows, figures)


Row = tuple[Callable[[], object], int]
"""The timed function, and the parameter count of its model."""


def _ours(options: GenerateOptions, *, method: Literal["beam", "greedy"]) -> Row:
    config = ModelConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_layers=options.layers,
        num_heads=options.hidden // 64,
        ffn_size=4 * options.hidden,
        max_positions=options.source + options.target,
    )
    padded = -(-options.vocabulary // 128) * 128
    model = build_model(config, padded_vocab_size=padded).to(device(), options.torch_dtype).eval()
    special = SpecialIds(pad=0, cls=2, sep=3, mask=4, vocab_size=options.vocabulary, special=(0, 1, 2, 3, 4))
    decoding = DecodingConfig(
        method=method,
        beam=options.beams,
        max_length=options.target,
        min_length=options.target,
        no_repeat_ngram=0,
        length_penalty=1.0,
    )
    search = build_search(decoding, special)
    sources = list(_sources(options).numpy())

    def step() -> None:
        (answers, *_) = generate_batch(model, sources, search=search, special=special)
        assert len(answers[0].tokens) == options.target

    return step, _parameters(model)


def _decoder(options: GenerateOptions, *, beams: int) -> Row:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=options.vocabulary,
        n_positions=options.source + options.target,
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=options.hidden // 64,
        **_TOKENS,
    )
    return _hugging_face(GPT2LMHeadModel(shape), options, beams=beams, length=options.source + options.target)


def _encoder_decoder(options: GenerateOptions) -> Row:
    from transformers import BartConfig, BartForConditionalGeneration

    half = max(1, options.layers // 2)
    heads, inner = options.hidden // 64, 4 * options.hidden
    shape = BartConfig(
        vocab_size=options.vocabulary,
        max_position_embeddings=options.source + options.target,
        d_model=options.hidden,
        encoder_layers=half,
        decoder_layers=half,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **_TOKENS,
    )
    # Its outputs start with the decoder's start token, which is not generated.
    return _hugging_face(BartForConditionalGeneration(shape), options, beams=options.beams, length=options.target + 1)


_TOKENS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


def _hugging_face(model: Any, options: GenerateOptions, *, beams: int, length: int) -> Row:
    model = model.to(device(), options.torch_dtype).eval()
    ids = _sources(options).to(device())
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "num_beams": beams,
        "do_sample": False,
        "max_new_tokens": options.target,
        "min_new_tokens": options.target,
    }
    if beams > 1:
        settings |= {"early_stopping": False, "length_penalty": 1.0}

    def step() -> None:
        answers = model.generate(ids, **settings)
        assert answers.shape == (options.batch, length), answers.shape

    return step, _parameters(model)


def _sources(options: GenerateOptions) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, options.vocabulary, (options.batch, options.source), generator=generator)


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
