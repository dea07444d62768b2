// fetch.h: a finished picture from where the fleet put it to a file here.
#ifndef DITFLEET_CLI_FETCH_H
#define DITFLEET_CLI_FETCH_H

#include "proto/job.h"

// Copies the picture at image->location (GET for a URL, else a path on this machine) to path, whole or not at all, and
// only if its size and SHA-256 are those of the result. Errors: ERR_UNAVAILABLE, ERR_NOT_FOUND, ERR_UPLOAD (an HTTP
// status), ERR_CORRUPT (another picture lies there), ERR_IO, ERR_NO_MEMORY.
int fetch_picture(const Ditfleet__V1__Image *image, const char *path, struct err *err);

#endif
