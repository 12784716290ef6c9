"""An artefact behind HTTP: a front that admits, a stage of processes that decode, and one of processes that explain in batches.

    client ── front (aiohttp) ── decode, without torch (mosec) ── explain, in batches (mosec)

mosec's stages see nothing of a request but its body, and answer in one type; so the front, which is the process that was started,
takes queries and headers, limits, deadlines and refusals, and hands on what it admitted in the framing of `wire`.
"""
