"""Who judges patches and generated images: a given classifier, or one that is trained here."""
