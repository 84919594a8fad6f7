"""Twenty prompts whose answers take much from them: code edits, JSON, summaries."""

from __future__ import annotations

from typing import NamedTuple


class DraftedPrompt(NamedTuple):
    """One user message of a chat."""

    kind: str
    text: str


_FUNCTION = """\
def total_price(items, tax_rate):
    total = 0.0
    for item in items:
        price = item["price"] * item["quantity"]
        if item.get("discount"):
            price = price * (1.0 - item["discount"])
        total = total + price
    return round(total * (1.0 + tax_rate), 2)
"""
_CLASS = """\
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("peek at an empty stack")
        return self.items[-1]
"""
_CONFIG = """\
[server]
host = "127.0.0.1"
port = 8080
workers = 4
timeout_seconds = 30

[logging]
level = "info"
file = "/var/log/server.log"
"""
_SQL = """\
SELECT customers.name, orders.id, orders.created_at, orders.total
FROM customers
JOIN orders ON orders.customer_id = customers.id
WHERE orders.total > 100 AND orders.created_at > '2024-01-01'
ORDER BY orders.created_at DESC;
"""
_PEOPLE = """\
Anna Berg, 34, engineer, Oslo
Tom Reyes, 41, teacher, Madrid
Mia Chen, 29, nurse, Taipei
Paul Novak, 52, carpenter, Prague
"""
_WEATHER = """\
Monday: sunny, high of 24 degrees, low of 13 degrees
Tuesday: cloudy, high of 21 degrees, low of 12 degrees
Wednesday: rain, high of 17 degrees, low of 11 degrees
Thursday: rain, high of 16 degrees, low of 10 degrees
"""
_BRIDGE = (
    "The old stone bridge over the river was built in 1784 by masons from the village. It has three "
    "arches and carried all traffic between the two banks until 1962, when the new steel bridge was "
    "opened. Since then only walkers and cyclists use the old stone bridge. In 2011 a flood damaged "
    "the middle arch, and the village collected money for its repair, which was finished in 2014."
)
_BEES = (
    "Honey bees live in colonies with one queen, several hundred drones and tens of thousands of "
    "workers. The workers collect nectar and pollen, feed the larvae and defend the hive. In winter "
    "the colony forms a cluster around the queen and keeps it warm by shivering. A strong colony "
    "needs about twenty kilograms of honey to live through the winter."
)

PROMPTS = (
    DraftedPrompt("code", f"Repeat this code exactly:\n\n```python\n{_FUNCTION}```"),
    DraftedPrompt("code", f"Rename the variable `total` to `amount` in this code:\n\n{_FUNCTION}"),
    DraftedPrompt("code", f"Add a docstring to this function:\n\n```python\n{_FUNCTION}```"),
    DraftedPrompt("code", f"Add a method `size` to this class:\n\n```python\n{_CLASS}```"),
    DraftedPrompt("code", f"Rename the class to `Pile`:\n\n```python\n{_CLASS}```"),
    DraftedPrompt("code", f"Add type hints to this class:\n\n```python\n{_CLASS}```"),
    DraftedPrompt("code", f"Change the port to 9090 in this file:\n\n```toml\n{_CONFIG}```"),
    DraftedPrompt("code", f"Sort this query by total instead:\n\n```sql\n{_SQL}```"),
    DraftedPrompt("json", f"Write these people as a JSON list:\n\n{_PEOPLE}"),
    DraftedPrompt("json", f"Write this forecast as a JSON list of days:\n\n{_WEATHER}"),
    DraftedPrompt("json", f"Convert this file to JSON:\n\n{_CONFIG}"),
    DraftedPrompt(
        "json", "Write a JSON list of the numbers from 1 to 40 with the keys n and even."
    ),
    DraftedPrompt("json", f"List the cities of these people as JSON:\n\n{_PEOPLE}"),
    DraftedPrompt("json", "Write a JSON object with the twelve months as keys and their days."),
    DraftedPrompt("summary", f"Summarize this text in two sentences:\n\n{_BRIDGE}"),
    DraftedPrompt("summary", f"Summarize this text in two sentences:\n\n{_BEES}"),
    DraftedPrompt("summary", f"List the facts of this text:\n\n{_BRIDGE}"),
    DraftedPrompt("summary", f"List the facts of this text:\n\n{_BEES}"),
    DraftedPrompt("summary", f"Correct the spelling of this text and repeat it:\n\n{_BRIDGE}"),
    DraftedPrompt("summary", f"Which day has the most rain?\n\n{_WEATHER}"),
)
