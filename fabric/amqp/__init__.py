"""The AMQP adapter: the only package that imports aiormq and pamqp (aio-pika's lower layers).

`connection.Link` is a supervised connection; `publisher`, `consumer`, `streams` and `declarer` work over one.
Back ends that use aio-pika or aiormq themselves need only `guard.install`.
"""
