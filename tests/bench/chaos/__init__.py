"""Faults under load, and what is looked for after each: ``python -m tests.bench.chaos``, or ``make chaos``.

Sixteen clients of eight customers ask, half of them in streams, while four of the customers have adapters
uploaded, made live and deleted all the time, and one reads a long stream. Faults come one after the other, in
an order and at moments that a seed chooses, each several times; a server whose process has ended is started
again, as an orchestrator would. After each fault there must be service for every customer again, and then:

- every answer was the one of a quiet time, by the version that the answer names, or a refusal with a code
  that the documentation has; streams broke only where the server itself was ended
- what was acknowledged is there as a whole, what was refused is not, and the audit names every change
- every adapter's bytes are those of its digest (``GET /admin/v1/check``)
- what clients were told in ``usage`` is on record, and nothing twice

Most faults run on the fake engine of the tests in a real server process, so that hundreds of them fit into
an hour; those of the engine's own processes run on the real one (``ENGINE=real``), under half of the
customers.
"""
