// What loading torch_npu and tracing with it ask of CANN, answered without a device.
//
// There is one device. Its memory is the host's, so tensors can be made and copied; whatever is done to it is
// done at once, so streams and events are names without work behind them. Everything else (a kernel, a
// collective, compiling or running a GE graph) is left to the generated refusals, which throw.
//
// Functions marked "by name" are looked up with dlsym; only the definition here makes them exist.
// Signatures: the headers of CANN that torch_npu's wheel carries (include/third_party/acl/inc).

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

using aclError = int;
constexpr aclError SUCCESS = 0;
constexpr aclError INVALID_PARAM = 100000;
constexpr aclError BAD_ALLOC = 200000;

extern "C" {

// --- the process and its device

aclError aclInit(const char *) { return SUCCESS; }
aclError aclFinalize() { return SUCCESS; }
const char *aclGetRecentErrMsg() { return ""; }
void aclAppLog(int, const char *, const char *, uint32_t, const char *, ...) {}

aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = 1;
    return SUCCESS;
}

aclError aclrtGetDevice(int32_t *device) {
    *device = 0;
    return SUCCESS;
}

aclError aclrtSetDevice(int32_t device) { return device == 0 ? SUCCESS : INVALID_PARAM; }
aclError aclrtResetDevice(int32_t device) { return device == 0 ? SUCCESS : INVALID_PARAM; }
aclError aclrtSynchronizeDevice() { return SUCCESS; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return SUCCESS; }  // by name

const char *aclrtGetSocName() {
    const char *name = std::getenv("OFFLINE_ASCEND_SOC");
    return name != nullptr ? name : "Ascend910B1";
}

// The release that the runtime, compiler and operators claim to be.
static const char *release() {
    const char *given = std::getenv("OFFLINE_ASCEND_CANN");
    return given != nullptr ? given : "9.1.0";
}

aclError aclsysGetVersionStr(const char *, char *version) {  // by name; the buffer has 128 bytes
    std::snprintf(version, 128, "%s", release());
    return SUCCESS;
}

struct PackageVersion {
    char version[128];
    char major[64], minor[64], release[64], patch[64];
    char reserved[128];
};

aclError aclsysGetCANNVersion(int, PackageVersion *version) {  // by name
    *version = {};
    std::snprintf(version->version, sizeof version->version, "%s", release());
    std::sscanf(release(), "%63[^.].%63[^.].%63s", version->major, version->minor, version->release);
    return SUCCESS;
}

// Checked string functions of CANN's base library; -1 where the text does not fit.

int vsnprintf_s(char *to, size_t room, size_t count, const char *format, va_list values) {
    const int length = std::vsnprintf(to, room, format, values);
    return length >= 0 && size_t(length) < room && size_t(length) <= count ? length : -1;
}

int snprintf_s(char *to, size_t room, size_t count, const char *format, ...) {
    va_list values;
    va_start(values, format);
    const int length = vsnprintf_s(to, room, count, format, values);
    va_end(values);
    return length;
}

int strcpy_s(char *to, size_t room, const char *from) {
    return snprintf_s(to, room, room, "%s", from) < 0 ? INVALID_PARAM : SUCCESS;
}

static int context;

aclError aclrtGetCurrentContext(void **current) {
    *current = &context;
    return SUCCESS;
}

aclError aclrtSetCurrentContext(void *) { return SUCCESS; }
aclError aclrtSetDeviceSatMode(int) { return SUCCESS; }  // by name
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return SUCCESS; }  // by name
aclError aclrtSetOpWaitTimeout(uint32_t) { return SUCCESS; }  // by name

// Whether operators are compiled at run time and the like: kept, since torch_npu reads back what it set.
static std::map<int, std::string> &compile_options() {
    static std::map<int, std::string> options;
    return options;
}

aclError aclSetCompileopt(int option, const char *value) {  // by name
    compile_options()[option] = value;
    return SUCCESS;
}

size_t aclGetCompileoptSize(int option) { return compile_options()[option].size() + 1; }

aclError aclGetCompileopt(int option, char *value, size_t room) {
    const std::string &kept = compile_options()[option];
    if (kept.size() >= room) return INVALID_PARAM;
    std::strcpy(value, kept.c_str());
    return SUCCESS;
}

int HcclSetConfig(int, int64_t) { return SUCCESS; }

static std::map<int, int64_t> &system_options() {
    static std::map<int, int64_t> options;
    return options;
}

aclError aclrtSetSysParamOpt(int option, int64_t value) {  // by name
    system_options()[option] = value;
    return SUCCESS;
}

aclError aclrtGetSysParamOpt(int option, int64_t *value) {  // by name
    *value = system_options()[option];
    return SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(int option, int64_t value) {  // by name
    return aclrtSetSysParamOpt(option, value);
}

// --- memory

aclError aclrtMalloc(void **memory, size_t size, int) {
    *memory = std::aligned_alloc(512, (size + 511) / 512 * 512);
    return *memory != nullptr ? SUCCESS : BAD_ALLOC;
}

aclError aclrtMallocAlign32(void **memory, size_t size, int policy) {  // by name
    return aclrtMalloc(memory, size, policy);
}

aclError aclrtFree(void *memory) {
    std::free(memory);
    return SUCCESS;
}

aclError aclrtMallocHost(void **memory, size_t size) { return aclrtMalloc(memory, size, 0); }
aclError aclrtFreeHost(void *memory) { return aclrtFree(memory); }

aclError aclrtGetMemInfo(int, size_t *available, size_t *total) {
    *available = *total = size_t(64) << 30;
    return SUCCESS;
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int) {
    if (size > room) return INVALID_PARAM;
    std::memmove(to, from, size);
    return SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *) {
    return aclrtMemcpy(to, room, from, size, kind);
}

aclError aclrtMemset(void *memory, size_t room, int32_t value, size_t size) {
    if (size > room) return INVALID_PARAM;
    std::memset(memory, value, size);
    return SUCCESS;
}

// --- streams and events: every one is done at once

static aclError make(void **handle) {
    *handle = std::malloc(1);
    return *handle != nullptr ? SUCCESS : BAD_ALLOC;
}

aclError aclrtCreateStream(void **stream) { return make(stream); }
aclError aclrtCreateStreamWithConfig(void **stream, uint32_t, uint32_t) { return make(stream); }
aclError aclrtDestroyStream(void *stream) { return aclrtFree(stream); }
aclError aclrtDestroyStreamForce(void *stream) { return aclrtFree(stream); }  // by name
aclError aclrtSynchronizeStream(void *) { return SUCCESS; }
aclError aclrtSynchronizeStreamWithTimeout(void *, int32_t) { return SUCCESS; }
aclError aclrtStreamWaitEvent(void *, void *) { return SUCCESS; }
aclError aclrtCreateEventExWithFlag(void **event, uint32_t) { return make(event); }
aclError aclrtDestroyEvent(void *event) { return aclrtFree(event); }
aclError aclrtRecordEvent(void *, void *) { return SUCCESS; }
aclError aclrtResetEvent(void *, void *) { return SUCCESS; }
aclError aclrtSynchronizeEvent(void *) { return SUCCESS; }

}  // extern "C"

// --- the graph engine: it can be initialized, nothing more

namespace ge {

class AscendString {
public:
    AscendString(const char *text);
    const char *GetString() const;
    bool operator<(const AscendString &other) const;
    bool operator==(const AscendString &other) const;

private:
    std::shared_ptr<std::string> text_;  // as in the header: torch_npu copies and destroys it inline
};

AscendString::AscendString(const char *text) : text_(std::make_shared<std::string>(text)) {}
const char *AscendString::GetString() const { return text_ ? text_->c_str() : ""; }
bool AscendString::operator<(const AscendString &other) const {
    return std::strcmp(GetString(), other.GetString()) < 0;
}
bool AscendString::operator==(const AscendString &other) const {
    return std::strcmp(GetString(), other.GetString()) == 0;
}

uint32_t GEInitialize(const std::map<AscendString, AscendString> &) { return SUCCESS; }
uint32_t GEFinalize() { return SUCCESS; }

// A session without state: what it could be used for (AddGraph, CompileGraph, RunGraph ...) is refused.
class Session {
public:
    explicit Session(const std::map<AscendString, AscendString> &);
    ~Session();
};

Session::Session(const std::map<AscendString, AscendString> &) {}
Session::~Session() = default;

// --- the operator library: it has every operator, with every input and attribute
//
// Converters of torchair ask whether the installed CANN knows what they are about to emit. There is none, so
// nothing speaks against it. npu_fusion_attribute_names is generated: all that the wheel's converters can name.

extern "C" const char *const npu_fusion_attribute_names[];

class TensorDesc {
public:
    TensorDesc();

private:
    std::shared_ptr<void> impl_;
};

TensorDesc::TensorDesc() = default;

class Operator {
public:
    virtual ~Operator() = default;
    uint32_t UpdateInputDesc(const char *name, const TensorDesc &description);
    uint32_t GetAllIrAttrNamesAndTypes(std::map<AscendString, AscendString> &attributes) const;

private:
    std::shared_ptr<void> impl_;
};

uint32_t Operator::UpdateInputDesc(const char *, const TensorDesc &) { return SUCCESS; }
uint32_t Operator::GetAllIrAttrNamesAndTypes(std::map<AscendString, AscendString> &attributes) const {
    for (auto name = npu_fusion_attribute_names; *name != nullptr; ++name) attributes.emplace(*name, "");
    return SUCCESS;
}

class OperatorFactory {
public:
    static bool IsExistOp(const char *type);
    static Operator CreateOperator(const char *name, const char *type);
};

bool OperatorFactory::IsExistOp(const char *) { return true; }
Operator OperatorFactory::CreateOperator(const char *, const char *) { return {}; }

}  // namespace ge
