"""The next token from its logits, on the device where they lie: nothing in here waits for a GPU, so its queue never runs dry.

    logits (B, V) --/ temperature, top-k, top-p--> probabilities p (V,) a row --argmax of p_v / e_v--> ids (B, 1)

e_v are independent exponential variables of rate 1, so e_v / p_v is one of rate p_v; of such variables the smallest is the v-th
with probability p_v / sum p. torch.multinomial does the same, after it has looked at p on the host.
"""
import torch

LOOK = {"cuda": 16}  # tokens between looks at whether all rows have ended; elsewhere 1, where a look costs nothing


def filter_logits(logits, top_k=None, top_p=None):
    """Keep the top_k highest logits and, of those, the smallest set whose probability reaches top_p; -inf elsewhere.

    Args: logits (B, V) float32, already divided by the temperature; top_k >= 1; 0 < top_p <= 1.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of everything ranked above
        drop = (before >= top_p).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


class Draw:
    """Draws one token for each of B rows; a row that drew eos is filled up with it.

    Args: as model.generate's. logits: (B, V), the first that will be drawn from; their values are not looked at.
    """

    def __init__(self, logits, temperature, top_k, top_p, generator, eos, banned):
        self.temperature, self.top_k, self.top_p, self.generator, self.eos = temperature, top_k, top_p, generator, eos
        self.finished = torch.zeros(len(logits), 1, dtype=torch.bool, device=logits.device)
        self.banned = torch.zeros(logits.shape[1], dtype=torch.bool)
        self.banned[list(banned)] = True
        self.banned = self.banned.to(logits.device) if len(banned) else None
        self.look, self.coming = LOOK.get(logits.device.type, 1), None

    def __call__(self, logits):
        """(B, V) -> (B, 1) int64."""
        logits = logits.float()
        if self.banned is not None:
            logits = logits.masked_fill(self.banned, float("-inf"))
        if self.temperature < 1e-6:  # by which float32 would overflow
            ids = logits.argmax(-1, keepdim=True)
        else:
            probabilities = filter_logits(logits / self.temperature, self.top_k, self.top_p).softmax(-1)
            waits = torch.empty_like(probabilities).exponential_(generator=self.generator)
            ids = (probabilities / waits).argmax(-1, keepdim=True)
        if self.eos is not None:
            ids = ids.masked_fill(self.finished, self.eos)
            self.finished |= ids == self.eos
        return ids

    def ended(self, tokens):
        """Whether all rows have ended, as far as is known after so many tokens: the answer of the look before is read, which a
        GPU has given long since."""
        if self.eos is None or tokens % self.look:
            return False
        if self.finished.device.type != "cuda":
            return bool(self.finished.all())
        before, event = self.coming, torch.cuda.Event()
        self.coming = self.finished.all().to("cpu", non_blocking=True), event
        event.record()
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])

    def whole(self, drawn):
        """[(B, 1), ...] -> (B, n): all of it, but for what was drawn after the last row had ended."""
        drawn = torch.cat(drawn, dim=1)
        if self.eos is None:
            return drawn
        ended = ((drawn == self.eos).cumsum(1) > 0).all(0)  # (n,): at this token, or before
        return drawn[:, :int((~ended).sum()) + 1]
