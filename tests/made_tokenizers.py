"""Tokenizers of every kind that matters, made on the spot: no downloads, no transformers.

Each is small enough to think about and contains, for some characters, only tokens for their bytes, so that
characters are split over tokens as in real vocabularies.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BOS, EOS = "<s>", "</s>"
_SPECIAL = [AddedToken(BOS, special=True), AddedToken(EOS, special=True)]
_CORPUS = ["hello world the cat sat on the mat", "日本語の文 привет мир", "def f(x): return x + 1\n\n"] * 5


def byte_level(vocab_size: int = 420) -> Tokenizer:
    """GPT-2, Llama 3, Qwen: every byte is a character of a printable alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=_SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def byte_fallback(*, drops_first_space: bool = True) -> Tokenizer:
    """Llama 2 and Mistral (which drop the first space) and Gemma (which does not): BPE over metaspaces with a
    token <0xNN> for each byte."""
    vocab = {"<unk>": 0, BOS: 1, EOS: 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in [*"▁abcdefghijklmnopqrstuvwxyz日.,", "▁t", "▁th", "▁the", "▁▁"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", "▁")
    if drops_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def metaspace_unigram() -> Tokenizer:
    """XGLM and early Llama conversions: a unigram model, metaspace before and after."""
    pieces = [("<unk>", 0.0), *((character, -5.0) for character in "▁abcdefghijklmnopqrstuvwxyzéö日本語👨.,")]
    pieces += [(piece, -2.0) for piece in ["▁the", "▁cat", "at", "▁s", "the", "▁▁"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def word_suffix() -> Tokenizer:
    """GPT-1: the end of a word is part of its last token. Its tokens are not fixed runs of bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", *_SPECIAL],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_keeping_first_space": lambda: byte_fallback(drops_first_space=False),
    "metaspace_unigram": metaspace_unigram,
    "word_suffix": word_suffix,
}
