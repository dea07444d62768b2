// report.h: a job's result in lines of "name value", as submit and show print it.
#ifndef DITFLEET_CLI_REPORT_H
#define DITFLEET_CLI_REPORT_H

#include "proto/job.h"

// On stdout; warnings on stderr.
void report_result(const Ditfleet__V1__Result *result);

// CLI_OK for SUCCEEDED; else CLI_FAILED, the error's code and text on stderr.
int report_outcome(const Ditfleet__V1__Result *result);

#endif
