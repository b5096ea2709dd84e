"""A process that renders customers' chat templates: ``python -m adapters.inspection.template_worker``.

A template is a program. It runs in transformers' sandbox, as it would there, and here in a process of its
own, with an end to its time and memory: a loop without end, or a text that doubles, ends this process and
nothing else. One JSON object a line comes in, one goes out; see ``server.engine.templates``. The text that
was written follows it in as many ``bytes`` as it says: as JSON it might be six times as long.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

SECONDS = 2  # of processor time: a machine that is busy, or stands still, says nothing of a template
MEMORY = 1 << 30
# Of what a template may write, in bytes; a prompt of a million tokens has less.
MAX_TEXT = 8 << 20


def main() -> None:
    """Answers until its input ends, which it does with the server."""
    from transformers.utils.chat_template_utils import render_jinja_template

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say({"ready": True})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its default ends the process, even in a C function
        answer = _rendered(render_jinja_template, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        text = answer.pop("text", b"")
        _say(answer | {"bytes": len(text)}, text)


def _rendered(render: Any, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        if asked.get("trial"):
            return {"format": _format_of(asked["template"], render)}
        (text,), _ = render(
            conversations=[asked["conversation"]],
            tools=asked.get("tools"),
            documents=asked.get("documents"),
            chat_template=asked["template"],
            return_assistant_tokens_mask=False,
            continue_final_message=bool(asked.get("continue_final_message")),
            add_generation_prompt=bool(asked.get("add_generation_prompt")),
            **asked.get("variables", {}),
        )
        written = text.encode()
    except UnicodeEncodeError:
        return {"error": "it writes half a surrogate pair"}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except Exception as exc:  # a template raises what it likes
        return {"error": str(exc)[:500] or type(exc).__name__}
    if len(written) > MAX_TEXT:
        return {"error": f"it writes more than {MAX_TEXT} bytes"}
    return {"text": written}


def _format_of(template: str, render: Any) -> str:
    """``openai`` where the template takes a message's content in parts, else ``string``. Raises as it does.

    What is tried is what it will be given: it has to take a message of one text in either form.
    """
    words = "fWq7"  # of no template's own
    for content, form in ((words, "string"), ([{"type": "text", "text": words}], "openai")):
        conversation = [{"role": "user", "content": content}]
        try:
            (text,), _ = render(
                conversations=[conversation],
                chat_template=template,
                add_generation_prompt=True,
                bos_token="",
                eos_token="",
            )
        except (MemoryError, RecursionError):
            raise
        except Exception:
            if form == "openai":
                raise
            continue
        if words in text and "'type'" not in text and '"type"' not in text:
            return form
    raise ValueError("it does not write what a user says")


def _say(answer: dict[str, Any], text: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + text)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
