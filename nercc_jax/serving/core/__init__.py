"""The scheduler: the way of a query from the socket to its answer, in ten files of `serving/`.

1. `transport/_http.py` reads the request's body and `protocol/_messages.py` its tensors; the
   `ServedModel` (`_served_model.py`) hands the queries to `CodedBatcher` (`_batcher.py`).
2. `CodedBatcher.submit` accepts the request (`core/_open_requests.py`: deadline) and posts it to
   the scheduler's thread, which puts its queries into the queue (`core/_queue.py`).
3. `_dispatch.py`: while workers are idle, queries leave the queue as cells of a group
   (`core/_group.py`). Each goes to its own worker, and the code's redundancy follows.
4. Workers' answers come back as events of their group: the model's own answers go out at once,
   unless they look wrong: `_answer_screen.py` holds these back until another worker has answered.
5. `_fallback.py` decides about stragglers' queries: a surrogate's answer, decoding, or a second
   call. `OpenRequests` resolves the future with the `Reply`.

Data flows one way: request -> queue -> group -> workers -> answers -> reply. What adapts
(`Adaptation`, `adapt/_adaptation.py`) takes observations and returns immutable results.
"""
