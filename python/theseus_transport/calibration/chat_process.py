"""The process in which a chat template runs: started by file, imports nothing of this package.

The first line on stdin is JSON {"template", "tokens", "seconds", "bytes"}, every further one {"messages", "tools",
"asking"}; each is answered by a line of JSON on stdout, {"text"} or {"error"}. What takes more seconds of CPU time than
that ends the process; its memory is what it has after its imports, and so many bytes more.
"""

import datetime
import json
import resource
import sys


class SameDay(datetime.datetime):
    """The clock of templates that write the date: a run that goes on after midnight reads what it read before."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "SameDay":
        return cls(2024, 7, 26, tzinfo=tz)


def main() -> None:
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = SameDay  # type: ignore[attr-defined]
    render_jinja_template = chat_template_utils.render_jinja_template
    job = json.loads(sys.stdin.readline())
    with open("/proc/self/statm") as statm:
        most = int(statm.read().split()[0]) * resource.getpagesize() + job["bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + job["seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            chat = json.loads(line)
            options = {"tools": chat["tools"], "chat_template": job["template"], **job["tokens"]}
            options["add_generation_prompt"] = chat["asking"]
            text = render_jinja_template([chat["messages"]], **options)[0][0]
            longest = (1 << 16) + 8 * len(line)
            if len(text) > longest:
                raise ValueError(f"it makes {len(text)} characters of messages that allow {longest}")
            answer = json.dumps({"text": text})
        except Exception as error:  # templates are programs, and raise what they like
            answer = json.dumps({"error": (str(error) or type(error).__name__)[:1000]})
        print(answer, flush=True)


if __name__ == "__main__":
    main()
