#include "worker/precision.h"

int precision_of(const struct kernels *k, Ditfleet__V1__Precision wanted, Ditfleet__V1__Precision preferred,
                 struct precision *out, struct err *err)
{
    const bool f32_alone = k->activation == DT_F32; // a backend whose own type is float32 has no other
    if (wanted == DITFLEET__V1__PRECISION__PRECISION_DEFAULT && !f32_alone)
        wanted = preferred;
    *out = (struct precision){.activation = k->activation, .codes = k->activation};
    switch (wanted) {
    case DITFLEET__V1__PRECISION__PRECISION_DEFAULT:
        return 0;
    case DITFLEET__V1__PRECISION__PRECISION_FP32:
        out->activation = out->codes = DT_F32;
        return 0;
    case DITFLEET__V1__PRECISION__PRECISION_BF16:
    case DITFLEET__V1__PRECISION__PRECISION_FP16:
    case DITFLEET__V1__PRECISION__PRECISION_FP8:
    case DITFLEET__V1__PRECISION__PRECISION_INT8:
        out->activation = wanted == DITFLEET__V1__PRECISION__PRECISION_FP16 ? DT_F16 : DT_BF16;
        out->codes = wanted == DITFLEET__V1__PRECISION__PRECISION_FP8    ? DT_E4M3
                     : wanted == DITFLEET__V1__PRECISION__PRECISION_INT8 ? DT_I8
                                                                         : out->activation;
        if (!f32_alone)
            return 0;
        break;
    default:
        break;
    }
    return err_set(err, ERR_UNSUPPORTED, "precision %s: on %s there is %s", job_precision_name(wanted), k->name,
                   f32_alone ? "fp32" : "fp32, bf16, fp16, fp8 and int8");
}

const char *precision_name(const struct precision *p)
{
    if (dtype_quantised(p->codes))
        return p->codes == DT_I8 ? "int8" : "fp8";
    return p->activation == DT_F32 ? "fp32" : p->activation == DT_BF16 ? "bf16" : "fp16";
}
