"""`/v1/responses`: the text subset of OpenAI's Responses API, with its event stream."""
