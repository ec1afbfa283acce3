"""A real OpenAI-compatible server that judges pairs of reports by whether they are equal."""
import json

from word_server import WordServer, completion


class JudgeServer(WordServer):
    """`with JudgeServer(trouble) as server: server.url`; `trouble(number, body)` gives None or (status, headers, text) to send instead."""

    def __init__(self, trouble=lambda number, body: None):
        super().__init__(lambda number, body: trouble(number, body) or (200, {}, completion(self.verdict(body["messages"][1]["content"]))))

    @staticmethod
    def verdict(text: str) -> str:
        """The answer of a judge that can only tell whether two texts are equal."""
        first, second = text.split("Baseline:\n")[1].split("\n\nSecond report:\n")
        return json.dumps({"outcome": "unchanged" if first == second else "mixed", "direction": int(len(second) > len(first))})
