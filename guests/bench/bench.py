"""app.python: objects, dictionaries, strings, floating point."""
import sys


class Vector:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def add(self, other):
        return Vector(self.x + other.x, self.y + other.y)


def work(n):
    counts = {}
    v = Vector(0, 0)
    total = 0
    for k in range(n):
        for i in range(2000):
            v = v.add(Vector(i & 7, 1))
            counts[i % 97] = counts.get(i % 97, 0) + i
            if i % 3 == 0:
                total += len(str(i))
        s = "".join(chr(97 + (j * k) % 26) for j in range(200))
        total += s.count("a") + sum(sorted(map(ord, s))[:5])
        f = 0.5
        for i in range(500):
            f = f * 3.7 * (1 - f)
        total += int(f * 1000)
    return v.x, v.y, total, sum(counts.values())


print(work(int(sys.argv[1])))
