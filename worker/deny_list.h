// deny_list.h: phrases and patterns that no prompt may hold, from a file of the operator's.
//
// One a line, compared without regard to case, in NFKC, with invisible characters left out and white space as one
// space. A phrase is found wherever it stands; a line in slashes, /like (this|that)/, is a PCRE2 pattern. Blank lines
// and lines that begin with # are none.
#ifndef DITFLEET_DENY_LIST_H
#define DITFLEET_DENY_LIST_H

#include <stdbool.h>

#include "proto/err.h"

struct deny_list;

// ERR_NOT_FOUND, ERR_IO, ERR_NO_MEMORY, or ERR_INVALID, which names the line and what is wrong with it.
int deny_list_load(const char *path, struct deny_list **out, struct err *err);
void deny_list_free(struct deny_list *d); // NULL is fine

// Whether another file stands at its path since the list was read or this was asked last. One that is gone or cannot be
// looked at is no other.
bool deny_list_changed(struct deny_list *d);

// *line: of the first that text (UTF-8) meets; 0: none. ERR_NO_MEMORY; ERR_UNSUPPORTED: a pattern, in *line, that takes
// too long with this text.
int deny_list_match(const struct deny_list *d, const char *text, int *line, struct err *err);

#endif
