"""Benchmarks, one file a family: ``python -m benchmarks FAMILY`` (all families without one).

A family's file defines ``cases(device)``, which yields :class:`benchmarks._harness.Case`; what is no such case
(the time of an import) defines ``measure(settings)``, which returns rows of the same form.
"""
