"""The process of the stages. Its children import this file again, under another name, and decoders must not get torch by it."""

if __name__ == "__main__":
    from fastrel.serving import pipeline

    pipeline.run()
