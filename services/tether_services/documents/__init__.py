"""Documents that are made from the code: the page of errors and the OpenAPI documents of the JSON-over-HTTP form."""
