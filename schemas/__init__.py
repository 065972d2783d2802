"""Every record on the wire, the topics that carry them and the codecs between bytes and values.

Knows neither Faust, nor a Kafka client, nor a clock: everything else imports from here.
"""
