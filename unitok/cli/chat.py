"""`unitok chat`."""

import json
import sys
from collections.abc import Callable
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unitok.cli.arguments import BundleFolder, Dtype, Fields, Given, Input, sampling_of_flags
from unitok.conversations import media_part, parts_in, text_in, text_part, to_data_url
from unitok.errors import UserError, visible
from unitok.files import write_text
from unitok.hardware import check_device

if TYPE_CHECKING:
    from unitok.api import Unitok
    from unitok.generation_config import GenerationConfig

HELP = """\
  a line of text          say it, with the files that were attached, and get an answer
  /image FILE             attach a file to the next message; /audio FILE, and so on for each kind of content
  /modalities PLAN        what answers shall have, such as text,image; free: what the model chooses
  /again                  another answer to the last message
  /edit [TEXT]            take back the last message and its answer; with TEXT, say that instead
  /system TEXT            begin a new conversation with instructions
  /history                show the conversation
  /save FILE.json         write it as a list of messages, which `/load FILE.json` and `unitok tokenize` read
  /load FILE.json         go on with a conversation that was saved
  /new                    begin a new conversation
  /quit                   end (also Ctrl-D)"""


def _sampling() -> dict[str, type]:
    """Sampling parameters for all content, and for each kind alone."""
    from unitok.generation_config import SamplingParams
    from unitok.modalities import modalities

    return {"": SamplingParams, **dict.fromkeys(modalities(), SamplingParams)}


def chat(
    bundle: BundleFolder = Path("scenes"),
    *,
    modalities: str | None = None,
    system: str = "",
    seed: int | None = None,
    out: Path = Path("runs/chat"),
    device: str = "cpu",
    dtype: Dtype = "float32",
    generation_config: Input | None = None,
    generation: Annotated[Given, Fields(_sampling, "the bundle's")],
) -> None:
    """Talk with a bundle in the terminal. `/help` shows what can be typed; lines may also come from a file or pipe.

    Args:
        bundle: bundle with tokenizers and a decoder: its folder, USER/NAME[@REVISION] on the Hugging Face hub, or scenes, the built-in one
        modalities: what answers shall have: free, what the model chooses (the default), or a plan such as text,image:8x12,audio:2s
        system: instructions that begin the conversation
        seed: of the first answer (default: 0); each later one has the next seed
        out: folder for the images and audio of the answers
        device: where to run: cpu, cuda, cuda:1, mps
        dtype: of the weights that generate; int8: on a CPU; auto: the fastest here

    generation:
        generation_config: JSON file such as {"temperature": 0.9, "image": {"top_k": 50}}: goes before the bundle's own, flags before it
        generation: for all content, and for each kind alone
    """
    keywords: dict[str, Any] = generation.pop("", {}) | {"sampling": sampling_of_flags(generation, "")}
    from unitok.api import Unitok
    from unitok.generation_config import GenerationConfig
    from unitok.sample.requests import config_for

    file = GenerationConfig.from_pretrained(generation_config) if generation_config else GenerationConfig()
    unitok = Unitok.from_pretrained(bundle, device=check_device(device), dtype=dtype)
    keywords |= {name: value for name, value in (("modalities", modalities), ("seed", seed)) if value is not None}
    usual = GenerationConfig(modalities="free", seed=0)
    talk = _Talk(unitok, config_for(unitok, usual, file, GenerationConfig(**keywords)), out)
    if system:
        talk.begin(system)
    talk.run()


class _Talk:
    """A conversation in a terminal."""

    def __init__(self, unitok: "Unitok", config: "GenerationConfig", out: Path):
        self.unitok, self.config, self.out = unitok, config, out  # the config is that of the next answer
        self.messages: list[dict[str, Any]] = []
        self.attached: list[dict[str, Any]] = []  # parts of the next message
        self.files = 0  # written so far

    def run(self) -> None:
        """Read lines until the end."""
        typed = sys.stdin.isatty()
        if typed:
            print("Say something; /help shows what else can be typed.")
        while (line := _line(typed)) is not None:
            try:
                if not line.startswith("/"):
                    self.say(line)
                elif line.split()[0] == "/quit":
                    return
                else:
                    self.command(*line[1:].split(maxsplit=1))
            except (UserError, OSError) as error:  # in a terminal one goes on
                if not typed:
                    raise
                print(f"error: {visible(str(error))}", file=sys.stderr)

    def command(self, name: str = "", argument: str = "") -> None:
        """Run what follows a slash. Errors: `UserError` for a command that does not exist or lacks what it needs."""
        commands: dict[str, Callable[[str], None]] = {
            "modalities": self.choose, "again": self.again, "edit": self.edit, "system": self.begin, "history": self.history,
            "save": self.save, "load": self.load, "new": self.begin, "help": lambda _: print(HELP),
        }  # fmt: skip
        kinds = [kind for kind, modality in self.unitok.types.items() if not modality.inline]
        if name in kinds:
            self.attach(name, argument)
        elif name in commands:
            commands[name](argument)
        else:
            known = ", ".join(f"/{known}" for known in (*kinds, *commands, "quit"))
            raise UserError(f"/{name}: no such command; there is {known}")

    # ---- Turns ---------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Say a text, with what was attached, and show the answer."""
        parts = [*self.attached, *([text_part(text)] if text else [])]
        if parts:
            self.answer([*self.messages, {"role": "user", "content": parts}])
            self.attached = []

    def answer(self, messages: list[dict[str, Any]]) -> None:
        """Generate and show the answer to messages, and keep it."""
        from unitok.cli.terminal import show
        from unitok.sample.chat import Reply

        (reply,) = show(self.unitok.chats.stream(messages, self.config), self.unitok)
        assert isinstance(reply, Reply)
        self.config = self.config.replace(seed=self.config.seed + 1)
        self.messages = [*messages, reply.message]
        for i, segment in enumerate(reply.new.segments):
            modality = self.unitok.modality(segment.modality)
            if not modality.inline:
                self.out.mkdir(parents=True, exist_ok=True)
                while list(self.out.glob(f"{self.files:04d}.*")):
                    self.files += 1
                print(modality.save(self.unitok.require(segment.modality), reply.content(i), self.out / f"{self.files:04d}"))

    # ---- Commands ------------------------------------------------------------------------------------------------

    def attach(self, kind: str, path: str) -> None:
        """Attach a file to the next message."""
        if not path:
            raise UserError(f"/{kind} FILE: name a file")
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{path}: no such file")
        if not file.stat().st_size:
            raise UserError(f"{path}: an empty file; replace it")
        part = media_part(kind, to_data_url(file.read_bytes(), guess_type(file.name)[0]))
        try:  # now: later each message would fail on it
            self.unitok.chats.document([{"role": "user", "content": [part]}])
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix('messages: ')}; it is not attached") from None
        self.attached.append(part)

    def choose(self, modalities: str) -> None:
        """Choose what answers shall have."""
        from unitok.plan import parse_plan

        parse_plan(modalities, self.unitok.vocab, self.unitok.rates)
        self.config = self.config.replace(modalities=modalities)

    def again(self, _: str) -> None:
        """Answer the last message again."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("/again: nothing was said yet")
        self.answer(self.messages[:-1])

    def edit(self, text: str) -> None:
        """Take back the last message and its answer; say a text instead, if there is one."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise UserError("/edit: nothing was said yet")
        before = self.messages, self.attached
        said = parts_in(self.messages[-2]["content"])
        self.messages = self.messages[:-2]
        self.attached = [part for part in said if text_in(part) is None]
        try:
            if text:
                self.say(text)
        except UserError:
            self.messages, self.attached = before
            raise

    def begin(self, system: str) -> None:
        """Begin a new conversation, with instructions if there are any."""
        self.messages, self.attached = [{"role": "system", "content": system}] if system else [], []

    def history(self, _: str) -> None:
        """Print the conversation."""
        for message in self.messages:
            shown = (text_in(part) or f"[{str(part['type']).removesuffix('_url')}]" for part in parts_in(message["content"]))
            print(f"{message['role']}: {' '.join(map(visible, shown))}")

    def save(self, path: str) -> None:
        """Write the conversation."""
        if not path.endswith(".json"):
            raise UserError("/save FILE.json: name a file that ends in .json")
        text = json.dumps([{"messages": self.messages}], ensure_ascii=False) + "\n"
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_text(Path(path), text)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        print(f"{path}: {len(self.messages)} messages")

    def load(self, path: str) -> None:
        """Go on with a conversation that `save` wrote."""
        try:
            (saved,) = json.loads(Path(path).read_text(encoding="utf-8"))
            messages = [*saved["messages"]]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: not a conversation that /save wrote") from None
        self.unitok.chats.document([*messages, {"role": "user", "content": "."}])
        self.messages = messages


def _line(typed: bool) -> str | None:
    """The next line; None at the end."""
    try:
        return input("> " if typed else "").strip()
    except EOFError:
        return None
