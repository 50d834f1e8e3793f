"""The paper's claims at pocket size: a declaration, runs with seeds, an interval, a verdict by a rule that was there first."""
