"""`unitok train-text-tokenizer`."""

from pathlib import Path

from unitok.cli.arguments import check_input
from unitok.files import check_inputs, check_replaceable


def train_text_tokenizer(
    source: list[str], *, out: Path, vocab_size: int = 8000, max_lines: int = 5_000_000, overwrite: bool = False
) -> None:
    """Train a SentencePiece BPE tokenizer with byte fallback from raw text.

    Args:
        source: UTF-8 text files (one string per line), interleaved .jsonl files, or what unitok tokenize takes: folders, patterns,
            archives, tables, recipes (.yaml)
        out: folder to write the tokenizer to
        vocab_size: pieces, 256 of them bytes; a small corpus gives fewer
        max_lines: most strings to train on
        overwrite: replace what is in the folder, also where it is something else
    """
    for path in source:
        if "://" not in path and "*" not in path:
            check_input(Path(path))
    from unitok.data.prepare.texts import read_texts
    from unitok.tokenizers import TextTokenizer

    check_replaceable(out, "text tokenizer", overwrite)
    check_inputs(out, [path for path in source if "://" not in path])
    tokenizer = TextTokenizer.train((text for path in source for text in read_texts(path)), vocab_size, max_lines)
    tokenizer.save_pretrained(out, overwrite)
    fewer = "" if tokenizer.size == vocab_size else f" of the {vocab_size} asked for: the text gives no more"
    print(f"{out}: {tokenizer.size} pieces{fewer}")
