"""A server that OpenAI's clients talk to: `nanopd-lab serve`, in front of a `Cluster`.

    schema     what a client sends, checked, as `SamplingParams`
    replies    what it gets, in OpenAI's shapes
    events     the same piece by piece, as a stream
    bridge     between the cluster's thread and asyncio
    telemetry  what Prometheus reads
    app        the endpoints
    server     uvicorn's, with an end that clients are told of

It needs the extra `serve`.
"""
