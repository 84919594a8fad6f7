"""Small tokenizers of the kinds that real models have, one per way of decoding."""

from __future__ import annotations

import functools

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

EOS = "<|end|>"
_CORPUS = [
    "the quick brown fox jumps over the lazy dog, again and again and again",
    "naïve café, 你好世界 你好, 🙂🙂 🚀 👩‍👩‍👧 and é as two characters",
    "stop here. Stop there!\n\nUser: what?\nAssistant: nothing  at   all",
] * 3


@functools.cache
def byte_level() -> Tokenizer:
    """Return a byte-level BPE (GPT-2, Llama 3, Qwen): merges may cut characters in two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        min_frequency=2,
        special_tokens=[EOS, "<｜wide｜>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Return a BPE with byte tokens and a decoder that strips the first space (Llama 2)."""
    characters = sorted(set("".join(_CORPUS[:1] + _CORPUS[2:3])) - {" ", "\n"})
    words = ["th", "the", "▁", "▁th", "▁the", "ag", "ai", "▁a", "▁▁"]
    tokens = ["<unk>", "<s>", EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokens += [word for word in words if word not in tokens]
    merges = [("t", "h"), ("th", "e"), ("▁", "th"), ("▁", "the"), ("a", "g"), ("a", "i")]
    merges += [("▁", "a"), ("▁", "▁")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return tokenizer


@functools.cache
def unigram() -> Tokenizer:
    """Return a Unigram model with Metaspace on both sides (T5, XGLM)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", EOS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


@functools.cache
def word_piece() -> Tokenizer:
    """Return a WordPiece model, whose decoder puts spaces between words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", EOS], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


@functools.cache
def end_of_word() -> Tokenizer:
    """Return a BPE that marks the ends of words (GPT-1)."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", EOS],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer
