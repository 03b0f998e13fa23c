"""Step 2 of the emoji FLUX: train tokenizers and tiny CLIP and T5 text encoders.

The encoders predict the image's latents from its caption.

    python examples/train_emoji/text_encoders.py --run runs/emoji

Takes a minute. Reads `<run>/autoencoder/vae` and writes `<run>/text`. The encoders come to the flow
model already trained, as CLIP and T5 do for FLUX, on a task that makes their embeddings say what
the image looks like.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from fastdistill.data.emoji import Emoji

CLIP_TOKENS = 16
T5_TOKENS = 8
WIDTH = 96


def words(captions: list[str]) -> list[str]:
    """Words of the captions, split as by the tokenizers, and single letters to spell other words."""
    found = {word for caption in captions for word in caption.replace("-", " - ").split()}
    return sorted(found) + list("abcdefghijklmnopqrstuvwxyz0123456789")


def clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE, trained until the captions' words are whole tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=special,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(captions) * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    vocab = dict(model["vocab"])
    # Single characters at the end of a word are not in the trainer's alphabet, but spelling an
    # unknown word needs them.
    for character in alphabet:
        vocab.setdefault(character + "</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)


def t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """T5's unigram model over the captions' words and single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -4.0) for word in words(captions) if len(word) > 1]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789-'"]
    # Hyphenated captions are one run without spaces: their parts must exist without the word mark,
    # too.
    inner = {
        part
        for caption in captions
        for word in caption.split()
        if "-" in word
        for part in word.split("-")[1:]
        if len(part) > 1
    }
    pieces += [(part, -6.0) for part in sorted(inner)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def build(clip_vocab: CLIPTokenizer, t5_vocab: T5TokenizerFast) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_vocab),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=clip_vocab.bos_token_id,
            eos_token_id=clip_vocab.eos_token_id,
            pad_token_id=clip_vocab.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_vocab),
            d_model=WIDTH,
            d_kv=24,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    return clip, t5


def ids(tokenizer: CLIPTokenizer | T5TokenizerFast, captions: list[str], length: int) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def mean_latents(vae: AutoencoderKL, data: Emoji, draws: int = 16) -> torch.Tensor:
    """Mean latents of each caption over fresh draws, flattened: (captions, 1024)."""
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(len(data), 0)
    for _ in range(draws):
        pixels = data.draw(torch.arange(len(data)), generator).pixels
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(50)]).flatten(1)
        total = latents if total.numel() == 0 else total + latents
    return (total / draws - vae.config.shift_factor) * vae.config.scaling_factor


def main(run: Path, steps: int = 1200, seed: int = 0) -> None:
    data = Emoji()
    vae = AutoencoderKL.from_pretrained(run / "autoencoder" / "vae")
    torch.manual_seed(seed)
    # The empty caption, used for guidance, stands for the mean of all images.
    target = mean_latents(vae, data)
    target = torch.cat([target, target.mean(dim=0, keepdim=True)])
    captions = [*data.captions, ""]
    clip_vocab, t5_vocab = clip_tokenizer(data.captions), t5_tokenizer(data.captions)
    clip, t5 = build(clip_vocab, t5_vocab)
    clip_ids, t5_ids = ids(clip_vocab, captions, CLIP_TOKENS), ids(t5_vocab, captions, T5_TOKENS)
    assert (
        len({tuple(row) for row in t5_ids.tolist()}) == len({tuple(row) for row in clip_ids.tolist()}) == len(captions)
    )
    heads = nn.ModuleList([nn.Linear(WIDTH, target.shape[1]), nn.Linear(WIDTH * T5_TOKENS, target.shape[1])])
    parameters = [*clip.parameters(), *t5.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = torch.randint(len(captions), (64,))
        pooled = clip(clip_ids[batch]).pooler_output
        tokens = t5(t5_ids[batch]).last_hidden_state.flatten(1)
        losses = [(head(x) - target[batch]).square().mean() for head, x in zip(heads, (pooled, tokens), strict=True)]
        (losses[0] + losses[1]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(
                f"step {step}: unexplained part of the mean latents: CLIP {losses[0]:.4f}, T5 {losses[1]:.4f}",
                flush=True,
            )
    out = run / "text"
    for name, part in {
        "tokenizer": clip_vocab,
        "tokenizer_2": t5_vocab,
        "text_encoder": clip,
        "text_encoder_2": t5,
    }.items():
        part.save_pretrained(out / name)
    print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
